# Sourced by the launch scripts: makes .venv beside the repository's files once, and enters it.
#
#   PYTHON=python3.12 launch/quickstart.sh    chooses the interpreter the environment is made with

make_environment() { # extras, e.g. "" or "[test]"
    local extras="$1" python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        echo "error: $python is not Python 3.11 or newer; install one (with its venv module), or set PYTHON" >&2
        exit 1
    fi
    if [ ! -x .venv/bin/pip ] && ! { rm -rf .venv && "$python" -m venv .venv; }; then
        echo "error: $python -m venv failed; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    fi
    . .venv/bin/activate
    # What was installed, by the files that say what to install: unchanged files need nothing done.
    local wanted
    wanted="$extras $(cat setup.cfg constraints.txt | sha256sum)"
    if [ "$(cat .venv/installed 2>/dev/null)" != "$wanted" ]; then
        echo "installing hdl and what it needs into .venv (torch is large: minutes) ..."
        # torch first, by its exact version, and nothing later may replace it
        pip install --quiet --disable-pip-version-check "$(grep '^torch==' constraints.txt)"
        pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".$extras"
        echo "$wanted" >.venv/installed
    fi
}
