# Sourced by the scripts beside it: makes .venv once and installs mmkd with the extras in $1 (for example "[test]").
# Installing again is skipped while pyproject.toml and constraints.txt are the ones that were installed.
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "mmkd needs Python 3.10 or newer; set PYTHON to one" >&2
    exit 2
}
[ -x .venv/bin/python ] || "$python" -m venv .venv
extras="${1:-}"
state="$(cat pyproject.toml constraints.txt | cksum) $extras"
if [ "$(cat ".venv/installed$extras" 2>/dev/null)" != "$state" ]; then
    echo "installing mmkd$extras into .venv (about a minute; 6 GB with CUDA libraries)"
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e ".$extras"
    echo "$state" >".venv/installed$extras"
fi
