#!/usr/bin/env bash
# The whole of RLHF in a small world, on two CPU cores: `iterate` with the recipe tiny.yaml. Every command is printed
# before it runs, is the one that runs for an 8B model, and can be repeated by hand. Run again after any interruption, it
# goes on where it stood; when all is done it says so. The last lines check what came out.
#
#     RUN=runs/tiny SIZE=demo scripts/tiny.sh            SIZE=ci is the size of the tests
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
SIZE=${SIZE:-demo}
RUN=${RUN:-runs/tiny}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} # so small a model gains little from two, and loses much on a busy machine
command -v nvidia-smi >/dev/null || export DS_ACCELERATOR=cpu # else DeepSpeed's launcher and ranks each warn of it
BACKEND=${BACKEND:-$(scripts/backend.sh "$PYTHON")}
case $SIZE in
    demo) recipe=tiny check=() ;;
    ci) recipe=tiny_ci check=(--proxy_only) ;;
    *) echo "SIZE is demo or ci, not $SIZE" >&2; exit 2 ;;
esac
engine=()
if [ "$BACKEND" != vllm ]; then
    echo "vLLM is not installed here: responses are sampled with --backend $BACKEND"
    engine=(--before.generate.backend "$BACKEND" --generate.backend "$BACKEND")
fi

"$PYTHON" -m rlhf_pipeline.iterate --recipe "scripts/recipes/$recipe.yaml" --output "$RUN" "${engine[@]}" "$@"
"$PYTHON" scripts/check_demo.py "$RUN" "${check[@]}"
