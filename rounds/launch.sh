# Sourced by the launchers. `rstar` is, in this order: $RSTAR, the environment that rounds/quickstart.sh made, or the one on PATH;
# `ray` is the one on PATH, or that environment's.

unset CDPATH # cd would print where it went
checkout="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)" # we stay where we are: the user's paths are relative to it
RSTAR="${RSTAR:-$([ -x "$checkout/.venv/bin/rstar" ] && echo "$checkout/.venv/bin/rstar" || echo rstar)}"
PATH="$PATH:$checkout/.venv/bin"
# A Ray head asks for a token where its user has one, and who joins must say that he has it.
[ -n "${RAY_AUTH_MODE:-}" ] || [ ! -f ~/.ray/auth_token ] || export RAY_AUTH_MODE=token

usage_or_go() { # usage_or_go HOW_MANY "$@": print the launcher's own first comment for --help or too few arguments
    local needed="$1"
    shift
    case "${1:-}" in --help | -h) set -- && needed=0 ;; *) [ $# -ge "$needed" ] && return 0 ;; esac
    sed -n '2,/^\(#SBATCH\|[^#]\)/{/^# \{0,1\}/!d;/^#SBATCH/d;s/^# \{0,1\}//;p}' "$0"
    [ "$needed" = 0 ] && exit 0
    exit 2
}
