#!/usr/bin/env bash
# The part of the official image's entry point that k8s/platform uses: an empty PGDATA becomes a database cluster with POSTGRES_USER's password
# and POSTGRES_DB; then the command runs. Usage: docker-entrypoint.sh postgres [FLAG...]
set -euo pipefail
user=${POSTGRES_USER:-postgres}; database=${POSTGRES_DB:-$user}
if [ "$1" = postgres ] && [ ! -s "$PGDATA/PG_VERSION" ]; then
  [ -s "${POSTGRES_PASSWORD_FILE:-}" ] || { echo "Error: Database is uninitialized and superuser password is not specified (POSTGRES_PASSWORD_FILE)." >&2; exit 1; }
  mkdir -p "$PGDATA"; chmod 00700 "$PGDATA" || true
  initdb --username="$user" --pwfile=<(head -n 1 "$POSTGRES_PASSWORD_FILE") --auth-host=scram-sha-256 --auth-local=trust
  echo "host all all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
  pg_ctl --wait --pgdata "$PGDATA" -o "-c listen_addresses='' -c unix_socket_directories=/var/run/postgresql" start
  if [ "$database" != postgres ]; then psql --username "$user" --dbname postgres -v ON_ERROR_STOP=1 -v database="$database" <<<'CREATE DATABASE :"database";'; fi
  pg_ctl --wait --pgdata "$PGDATA" --mode fast stop
fi
if [ "$1" = postgres ]; then shift; set -- postgres -c listen_addresses='*' -c unix_socket_directories=/var/run/postgresql "$@"; fi
exec "$@"
