"""Certificates made for a test: an authority, and what it signs for 127.0.0.1 and localhost."""

from __future__ import annotations

import datetime
import ipaddress
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

_DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Files:
    """Where a certificate and its key lie."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates and writes them into a directory."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = directory / f"{name}.pem"
        constraints = x509.BasicConstraints(ca=True, path_length=None)
        built = self._build(self._name, self._key.public_key(), _DAY).add_extension(
            constraints, critical=True
        )
        self._write(built.sign(self._key, hashes.SHA256()), self.certificate)

    def issue(self, name: str, lifetime: datetime.timedelta = _DAY) -> Files:
        """A certificate valid from two days ago to `lifetime` from now; a negative one is over."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        addresses = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        built = self._build(subject, key.public_key(), lifetime)
        built = built.add_extension(x509.SubjectAlternativeName(addresses), critical=False)
        files = Files(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        self._write(built.sign(self._key, hashes.SHA256()), files.certificate)
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files

    def _build(
        self, subject: x509.Name, key: ec.EllipticCurvePublicKey, lifetime: datetime.timedelta
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - 2 * _DAY)
            .not_valid_after(now + lifetime)
        )

    @staticmethod
    def _write(certificate: x509.Certificate, path: Path) -> None:
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
