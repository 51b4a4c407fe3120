#!/usr/bin/env bash
# Makes .venv.
#     install.sh cpu     what envs/cpu.txt names: everything, for CPUs
#     install.sh gpu     what the two conda files name, in one environment, and flash-attn where it can be built
#     install.sh         what is there, kept up to date; cpu where there is nothing. Done at once if nothing changed.
#     install.sh lock    no environment: writes envs/cpu-lock.txt anew from envs/cpu.txt
set -euo pipefail
cd "$(dirname "$0")/.."

uv_version=0.13.8
venv=.venv
export UV_COMPILE_BYTECODE=1 # where Python may not write its own, every command would compile 2,000 files first
stamp=$venv/installed # its first line says cpu or gpu, the rest is what was wanted

say() { printf '%s\n' "install: $*"; }

# uv itself, by pip into .uv where there is none: neither a global installation nor a word from the user is needed.
find_uv() {
    if uv --version >/dev/null 2>&1; then
        uv=uv
        return
    fi
    uv=.uv/bin/uv
    [ -x $uv ] && return
    say "getting uv $uv_version into .uv"
    python3 -m pip install --quiet --target .uv "uv==$uv_version" ||
        { say "uv is needed and pip could not install it: see https://docs.astral.sh/uv"; exit 1; }
}

# Runs a command of uv's that needs torch's CPU build: from pip's local wheels, if any are configured and hold it, else
# from PyTorch's own index.
with_cpu_torch() {
    local links=${UV_FIND_LINKS:-${PIP_FIND_LINKS:-$(python3 -m pip config get global.find-links 2>/dev/null || true)}}
    if [ -n "$links" ]; then
        UV_FIND_LINKS=${links// /,} "$@" && return
    fi
    UV_FIND_LINKS="" UV_TORCH_BACKEND=cpu "$@"
}

install_cpu() {
    local install=($uv pip install --python $venv --constraints envs/cpu-lock.txt --overrides envs/cpu-overrides.txt)
    with_cpu_torch "${install[@]}" --requirements envs/cpu.txt && return
    say "vLLM's CPU build can't be installed here; going on without it: --backend transformers samples instead"
    grep -v '^vllm' envs/cpu.txt >$venv/without-vllm.txt
    with_cpu_torch "${install[@]}" --requirements $venv/without-vllm.txt
}

# The pins of both conda files agree today, so that one environment serves all stages.
install_gpu() {
    sed -n 's/^ *- \([a-z_]*==[^ ]*\).*/\1/p' envs/vllm_env.yml envs/rebel_env.yml | sort -u >$venv/gpu.txt
    $uv pip install --python $venv --requirements $venv/gpu.txt --editable '.[dev]'
    say "building flash-attn, which can take long (MAX_JOBS=4 limits its memory)"
    $uv pip install --python $venv setuptools wheel ninja packaging psutil
    $uv pip install --python $venv --editable '.[flash]' ||
        say "flash-attn can't be built here; going on without it: train takes the next best attention and says which"
}

make_venv() {
    rm -rf $venv && mkdir $venv
    printf '%s\n' "$1" >$stamp # not yet all that is wanted, so that an interrupted installation starts again
    $uv venv --quiet --allow-existing --python 3.11 $venv
}

wanted() {
    printf '%s\n' "$1" "$PWD"
    cat envs/cpu*.txt envs/*.yml pyproject.toml scripts/install.sh
}

bring_up_to_date() {
    if wanted "$1" | cmp -s - $stamp; then
        return
    fi
    if [ -e $venv ] && [ ! -e $stamp ]; then
        say "$venv is there and was not made by this script: move it away, then run this again"
        exit 2
    fi
    find_uv
    say "making $venv for $1, Python 3.11"
    make_venv "$1"
    "install_$1"
    $uv pip install --quiet --python $venv --no-deps --editable .
    wanted "$1" >$stamp
    say "done: $venv"
}

# Torch's local version is cut off: what is locked holds as constraints on every platform.
lock() {
    find_uv
    local compile=($uv pip compile --quiet --no-header --no-annotate --overrides envs/cpu-overrides.txt)
    compile+=(--python-version 3.11 --python-platform x86_64-unknown-linux-gnu envs/cpu.txt)
    local lines
    lines=$(with_cpu_torch "${compile[@]}")
    printf '%s\n' '# Written by `make lock`: what envs/cpu.txt brings with it.' "${lines//+cpu/}" >envs/cpu-lock.txt
}

case ${1:-} in
    cpu | gpu) bring_up_to_date "$1" ;;
    lock) lock ;;
    "") bring_up_to_date "$(head -n 1 $stamp 2>/dev/null || echo cpu)" ;;
    *) say "expected cpu, gpu, lock or nothing, not $1"; exit 2 ;;
esac
