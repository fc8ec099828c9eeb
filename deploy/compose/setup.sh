# Runs once before everything else, as root with no capability but CHOWN: tokens, and owners of the volumes. Again, it changes
# nothing: tokens are written whole or not at all, and a volume belongs to the services from then on.
set -eu
umask 077
token() {
    head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'
}
if [ ! -s /volumes/auth/tokens ]; then
    printf 'operate:%s\nread:%s\n' "$(token)" "$(token)" >/volumes/auth/new
    chown 10001:10001 /volumes/auth/new
    mv /volumes/auth/new /volumes/auth/tokens
fi
chown 10001:10001 /volumes/auth /volumes/redis /volumes/prometheus /volumes/grafana
