"""The door: tokens, roles, loopback, rates, certificates that change, hidden secrets."""

import datetime
import hmac
import os
import secrets

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import SecretStr

from sdar.contracts.errors import (
    CapacityError,
    ConfigurationError,
    ForbiddenError,
    UnauthenticatedError,
)
from sdar.process.settings import Settings
from sdar.process.text import escape_controls, hide_credentials
from sdar.wire.door import Door, RateLimit
from sdar.wire.security import Security, is_loopback, is_loopback_target
from sdar.wire.tls import Tls
from sdar.wire.tokens import MIN_TOKEN_CHARACTERS, Role, Token, find_token, parse_tokens
from sdar.wire.watched import Watched
from tests.certificates import Authority

READ_TOKEN, OPERATE_TOKEN = "r" * 40, "o" * 40


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def tokens_file(tmp_path):
    path = tmp_path / "tokens"
    path.write_text(f"# who may come in\nread:{READ_TOKEN}\n\noperate:{OPERATE_TOKEN}\n")
    return path


@pytest.fixture
def security(tokens_file):
    return Security.from_settings(Settings(tokens_file=tokens_file))


def replace(path, text):
    """As Kubernetes and editors do it: another file under the same name."""
    fresh = path.with_suffix(".fresh")
    fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
    os.replace(fresh, path)


# ---- tokens


@pytest.mark.parametrize(
    ("needed", "token", "refusal"),
    [
        (Role.READ, READ_TOKEN, None),
        (Role.READ, OPERATE_TOKEN, None),
        (Role.OPERATE, OPERATE_TOKEN, None),
        (Role.OPERATE, READ_TOKEN, ForbiddenError),
        (Role.READ, "x" * 40, UnauthenticatedError),
        (Role.READ, READ_TOKEN[:-1], UnauthenticatedError),
        (Role.READ, READ_TOKEN + "r", UnauthenticatedError),
        (Role.READ, "", UnauthenticatedError),
        (Role.READ, None, UnauthenticatedError),
        (None, None, None),
        (None, "x" * 40, None),
    ],
)
def test_a_role_opens_what_it_should_and_nothing_else(security, needed, token, refusal):
    shown = [] if token is None else [f"Bearer {token}"]
    if refusal is None:
        assert Door(security).admit(needed, shown, "10.0.0.1")
    else:
        with pytest.raises(refusal):
            Door(security).admit(needed, shown, "10.0.0.1")


@pytest.mark.parametrize(
    "shown",
    [
        [OPERATE_TOKEN],
        [f"Basic {OPERATE_TOKEN}"],
        [f"Bearer {OPERATE_TOKEN}", f"Bearer {OPERATE_TOKEN}"],
        ["Bearer"],
    ],
)
def test_a_token_counts_only_as_the_one_bearer_of_a_call(security, shown):
    with pytest.raises(UnauthenticatedError):
        Door(security).admit(Role.READ, shown, "10.0.0.1")


@given(st.text())
def test_no_other_text_opens_the_door(text):
    tokens = parse_tokens(f"operate:{OPERATE_TOKEN}", "FILE")
    assert (find_token(tokens, text) is not None) == (text == OPERATE_TOKEN)


def test_every_candidate_is_compared_at_one_length_whatever_was_found():
    lengths = []

    def compare(one, other):
        lengths.append((len(one), len(other)))
        return hmac.compare_digest(one, other)

    tokens = parse_tokens("\n".join(f"read:{letter * 40}" for letter in "abc"), "FILE")
    for presented in ("a" * 40, "c" * 40, "", "long" * 1000):
        lengths.clear()
        find_token(tokens, presented, compare)
        assert lengths == [(32, 32)] * 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "no token"),
        ("# only a comment", "no token"),
        (f"admin:{READ_TOKEN}", "line 1 names no role"),
        (READ_TOKEN, "line 1 names no role"),
        (f"read:{READ_TOKEN}\noperate:tooshort", "line 2: a token of 8 characters"),
        (f"read:{'ü' * 40}", "line 1: a token of 40 characters"),
        (f"read:{'a' * 20} {'b' * 20}", "line 1: a token of 41"),
        (f"operate:{READ_TOKEN}\nread:{READ_TOKEN}", "line 2 repeats the token of an earlier line"),
    ],
)
def test_a_bad_token_file_is_told_by_line_and_never_by_its_text(text, told):
    with pytest.raises(ConfigurationError, match=told) as caught:
        parse_tokens(text, "FILE")
    for secret in ("tooshort", READ_TOKEN, "a" * 20):
        assert secret not in str(caught.value)


def test_what_editors_and_shells_leave_around_a_token_is_no_part_of_it(tmp_path):
    tokens = tmp_path / "tokens"
    tokens.write_bytes(b"\xef\xbb\xbf" + f"\r\nread: {READ_TOKEN} \r\n\r\n".encode())
    security = Security.from_settings(
        Settings(tokens_file=tokens, token=SecretStr(f"{OPERATE_TOKEN}\n"))
    )
    assert security.tokens.get() == (Token(Role.READ, READ_TOKEN),)
    assert security.token_to_present() == OPERATE_TOKEN


def test_a_short_token_of_ones_own_is_refused_without_being_shown():
    with pytest.raises(ConfigurationError, match=f"SDAR_TOKEN.*{MIN_TOKEN_CHARACTERS}") as caught:
        Security.from_settings(Settings(token=SecretStr("hunter2")))
    assert "hunter2" not in str(caught.value)


def test_no_token_is_in_the_text_of_anything_that_holds_one(tokens_file):
    settings = Settings(
        token=SecretStr(OPERATE_TOKEN), redis_url=f"redis://:{READ_TOKEN}@127.0.0.1/0"
    )
    with_file = Security.from_settings(
        Settings(tokens_file=tokens_file, token=SecretStr(OPERATE_TOKEN))
    )
    assert with_file.tokens is not None
    for held in (
        settings,
        settings.model_dump_json(exclude={"redis_url"}),
        with_file,
        with_file.tokens.get(),
        Door(with_file),
    ):
        assert OPERATE_TOKEN not in f"{held!r} {held!s}"
        assert READ_TOKEN not in f"{held!r} {held!s}"


def test_a_client_is_named_by_its_token_whatever_its_address_and_the_name_reveals_nothing(
    security,
):
    door = Door(security)
    names = {
        door.admit(Role.READ, [f"Bearer {READ_TOKEN}"], address)
        for address in ("10.0.0.1", "10.0.0.2")
    }
    assert len(names) == 1
    assert READ_TOKEN[:8] not in names.pop()


def test_a_process_shows_its_own_token_or_the_first_operate_token_it_would_accept(tokens_file):
    assert Security().token_to_present() == ""
    found = Security.from_settings(Settings(tokens_file=tokens_file)).token_to_present()
    assert found == OPERATE_TOKEN
    own = Settings(tokens_file=tokens_file, token=SecretStr(READ_TOKEN))
    assert Security.from_settings(own).token_to_present() == READ_TOKEN


def test_changed_tokens_are_taken_up_without_a_restart_and_a_broken_file_changes_nothing(
    security, tokens_file, capsys
):
    door, fresh = Door(security), secrets.token_urlsafe()
    replace(tokens_file, f"operate:{fresh}")
    assert door.admit(Role.OPERATE, [f"Bearer {fresh}"], "")
    with pytest.raises(UnauthenticatedError):
        door.admit(Role.OPERATE, [f"Bearer {OPERATE_TOKEN}"], "")
    replace(tokens_file, f"operate:{fresh}\nnonsense")
    assert door.admit(Role.OPERATE, [f"Bearer {fresh}"], "")
    tokens_file.unlink()
    assert door.admit(Role.OPERATE, [f"Bearer {fresh}"], "")
    logged = capsys.readouterr().out
    assert logged.count("changed_files_refused") == 2
    assert fresh not in logged


def test_what_has_not_changed_is_not_read_again(tmp_path):
    path, reads = tmp_path / "file", []
    path.write_text("a")
    watched = Watched([path], lambda: reads.append(1))
    for _ in range(3):
        watched.get()
    assert reads == [1]


# ---- where a server may listen


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.9.9.9",
        "localhost",
        "LOCALHOST",
        "::1",
        "[::1]",
        "::ffff:127.0.0.1",
        "unix:/s",
    ],
)
def test_a_bind_to_loopback_asks_for_nothing(host):
    assert is_loopback(host)
    Security().check_bind(host)


@pytest.mark.parametrize(
    "host",
    [
        "0.0.0.0",
        "::",
        "",
        "10.0.0.1",
        "::ffff:10.0.0.1",
        "example.org",
        "localhost.example.org",
        "2130706433",
        "127.1",
    ],
)
def test_a_bind_beyond_loopback_without_tokens_is_refused_and_told_what_to_set(host):
    assert not is_loopback(host)
    with pytest.raises(ConfigurationError, match=r"SDAR_TOKENS_FILE.*SDAR_INSECURE"):
        Security().check_bind(host)


def test_beyond_loopback_tokens_or_a_loud_decision_open_the_port(security, capsys):
    security.check_bind("0.0.0.0")
    assert "tokens_travel_in_plaintext" in capsys.readouterr().out
    Security(is_insecure=True).check_bind("0.0.0.0")
    assert "open_to_anyone" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "is_local"),
    [
        ("127.0.0.1:9093", True),
        ("localhost:9093", True),
        ("[::1]:9093", True),
        ("dns:///localhost:9093", True),
        ("ipv4:127.0.0.1:1,127.0.0.1:2", True),
        ("unix:/run/envs.sock", True),
        ("ipv4:127.0.0.1:1,10.0.0.1:2", False),
        ("envs:9093", False),
        ("dns:///envs:9093", False),
    ],
)
def test_a_token_in_plaintext_to_another_machine_is_warned_of(target, is_local, security, capsys):
    assert is_loopback_target(target) == is_local
    security.check_target(target)
    security.check_target(target)
    assert capsys.readouterr().out.count("tokens_travel_in_plaintext") == (not is_local)


# ---- rates


def test_a_client_may_burst_and_then_call_at_its_rate():
    """10 a second with a burst of 2 seconds: 20 at once, then one each tenth of a second."""
    clock = Clock()
    limit = RateLimit(10, clock)
    assert [limit.take("a") for _ in range(20)] == [0.0] * 20
    assert limit.take("a") == pytest.approx(0.1)
    clock.now_s += 0.1001
    assert limit.take("a") == 0.0
    assert limit.take("a") > 0
    clock.now_s += 60
    assert [limit.take("a") for _ in range(20)] == [0.0] * 20
    assert limit.take("a") > 0


def test_one_client_uses_up_nothing_of_anothers():
    limit = RateLimit(1, Clock())
    while not limit.take("a"):
        pass
    assert limit.take("b") == 0.0


def test_a_rate_under_one_burst_still_lets_single_calls_through():
    clock = Clock()
    limit = RateLimit(0.1, clock)
    assert limit.take("a") == 0.0
    assert limit.take("a") == pytest.approx(10)
    clock.now_s += 10.001
    assert limit.take("a") == 0.0


def test_a_million_addresses_do_not_fill_the_memory():
    clock = Clock()
    limit = RateLimit(1, clock)
    for number in range(100_000):
        clock.now_s += 1e-4
        limit.take(str(number))
    assert limit.num_clients <= 10_000


def test_who_is_over_the_rate_is_told_when_to_come_back_and_is_refused_before_the_token_is_judged(
    security,
):
    door = Door(Security(tokens=security.tokens, max_calls_per_s=1), Clock())
    for _ in range(2):
        with pytest.raises(UnauthenticatedError):
            door.admit(Role.READ, ["Bearer guess"], "10.0.0.1")
    with pytest.raises(CapacityError) as caught:
        door.admit(Role.READ, ["Bearer guess"], "10.0.0.1")
    assert float(caught.value.fields["retry_after_s"]) == pytest.approx(1)
    assert door.admit(Role.READ, [f"Bearer {READ_TOKEN}"], "10.0.0.1")


# ---- certificates


def test_certificates_that_do_not_fit_are_refused_at_the_start(tmp_path):
    authority = Authority(tmp_path)
    one, other = authority.issue("one"), authority.issue("other")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Tls(one.certificate, other.key, None)
    with pytest.raises(ConfigurationError, match="belong together"):
        Tls(one.certificate, None, None)
    with pytest.raises(ConfigurationError, match="SDAR_TLS_CA"):
        Tls(one.certificate, one.key, None, "grpc")
    with pytest.raises(ConfigurationError, match=r"SDAR_TLS_KEY names .* cannot be read"):
        Tls(one.certificate, tmp_path / "none", None)
    replace(one.key, "no PEM")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        Tls(one.certificate, one.key, None)


def test_renewed_certificates_are_seen_and_half_written_ones_are_not_used(tmp_path):
    authority = Authority(tmp_path)
    files = authority.issue("server")
    tls = Tls(files.certificate, files.key, authority.certificate)
    first = tls.files.get()
    renewed = authority.issue("renewed", datetime.timedelta(days=9))
    replace(files.certificate, renewed.certificate.read_bytes())
    assert tls.files.get() is first  # the key is still the old one's
    replace(files.key, renewed.key.read_bytes())
    assert tls.files.get().chain == renewed.certificate.read_bytes()


# ---- text


@given(st.text())
def test_escaped_text_holds_no_control_character_and_the_rest_is_kept(text):
    escaped = escape_controls(text)
    assert all(
        character.isprintable() or character.isspace() or ord(character) > 0x9F
        for character in escaped
    )
    assert not set(escaped) & set("\x1b\n\r\x00\x85\u2028\u202e\u2066")
    if text.isprintable():
        assert escaped == text


def test_what_is_kept_is_kept():
    assert escape_controls("a\n\tb\x1b[31m", keep="\n\t") == "a\n\tb\\x1b[31m"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://127.0.0.1:6379/0", "redis://127.0.0.1:6379/0"),
        ("rediss://user:hunter2@redis:6379/0", "rediss://***@redis:6379/0"),
        ("redis://:hun/t@er2@redis:6379/0", "redis://***@redis:6379/0"),
        ("redis://redis:6379/0?password=hunter2", "redis://redis:6379/0"),
        ("unix://:hunter2@/run/redis.sock", "unix://***@/run/redis.sock"),
        ("redis://:hun?ter2@redis:6379/0", "redis://***"),
        ("redis://redis:6379/0?password=hun@ter2", "redis://***"),
        ("user:hunter2@redis:6379", "***@redis:6379"),
        ("user:hun?ter2@redis:6379", "***"),
    ],
)
def test_a_shown_url_holds_no_credentials(url, shown):
    assert hide_credentials(url) == shown
