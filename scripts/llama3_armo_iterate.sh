#!/usr/bin/env bash
# Three iterations of the tutorial's run, unattended: what scripts/llama3_armo.sh does, each from the policy before.
#
#     scripts/llama3_armo_iterate.sh                                    data in runs/llama3_armo
#     OWNER=your-hub-account scripts/llama3_armo_iterate.sh             data and policies on the Hub, private
#     scripts/llama3_armo_iterate.sh --check                            the plan, and whether every stage could run
#     scripts/llama3_armo_iterate.sh --iterations 1 --train.lr 1e-6     any flag of iterate, any flag of a stage
#
# Run it again after any interruption: it goes on where it stood. VLLM_PYTHON and TRAIN_PYTHON choose the environments
# of envs/vllm_env.yml and envs/rebel_env.yml where there are two.
set -euo pipefail
cd "$(dirname "$0")/.."

TRAIN_PYTHON=${TRAIN_PYTHON:-python}
hub=()
[ -z "${OWNER:-}" ] || hub=(--repo "$OWNER/${NAME:-ultrafeedback-llama3}")

exec "$TRAIN_PYTHON" -m rlhf_pipeline.iterate --recipe scripts/recipes/llama3_armo.yaml "${hub[@]}" \
    --train_python "$TRAIN_PYTHON" --vllm_python "${VLLM_PYTHON:-$TRAIN_PYTHON}" "$@"
