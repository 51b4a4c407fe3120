#!/usr/bin/env bash
# The whole of RLHF in a small world, on two CPU cores: every command is printed, runs as it would for an 8B model, and
# can be repeated by hand. Run again, it goes on where it stood; when all is done it says so.
#
#   RUN=runs/tiny scripts/tiny.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
RUN=${RUN:-runs/tiny}
BACKEND=${BACKEND:-$(scripts/backend.sh "$PYTHON")}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)} PYTHONWARNINGS=ignore

[ "$BACKEND" = vllm ] || echo "vLLM is not installed here: responses are sampled with --backend $BACKEND"

# stage NAME COMMAND...: print the command, run it, keep its seconds in timings.json
stage() {
    local name=$1 started=$EPOCHREALTIME
    shift
    printf '\n== %s\n$ %s\n' "$name" "$*"
    "$@"
    "$PYTHON" scripts/record_seconds.py "$RUN/timings.json" "$name" "$started" "$EPOCHREALTIME"
}

launch() { # two processes under DeepSpeed ZeRO-3, from the very file that serves 8 GPUs
    OMP_NUM_THREADS=1 stage "$1" "$PYTHON" -m accelerate.commands.launch \
        --config_file accelerate_cfgs/deepspeed_config_stage_3.yaml --mixed_precision no --num_processes 2 \
        --main_process_port 0 -m "${@:2}"
}

run() { stage "$1" "$PYTHON" -m "${@:2}"; }

mkdir -p "$RUN"
WORLD=$RUN/world

run world rlhf_pipeline.tiny --output "$WORLD" --size demo
run sft rlhf_pipeline.sft --base_model "$WORLD/start" --input_repo "$WORLD/demonstrations" --output_dir "$RUN/sft" \
    --batch_size 16 --epochs 4 --lr 6e-3

# The reward model learns from labels on the policy's own responses, made by the pipeline itself.
run reward_responses rlhf_pipeline.generate --backend "$BACKEND" --model "$RUN/sft" --prompts "$WORLD/prompts" \
    --num_responses 3 --temperature 1 --top_p 1 --maxlen 48 --seed 1000 --output_repo "$RUN/reward_data/responses"
run reward_labels rlhf_pipeline.rank --input_repo "$RUN/reward_data/responses" --num_responses 3 \
    --reward_model rlhf_pipeline.tiny:annotator --output_repo "$RUN/reward_data/labels"
run reward_pairs rlhf_pipeline.filter --input_repo "$RUN/reward_data/labels" --model "$RUN/sft" --num_responses 3 \
    --select all_pairs --min_responses 2 --maxlen 48 --maxlen_prompt 64 --test_size 0.1 \
    --output_repo "$RUN/reward_data/pairs"
run reward rlhf_pipeline.reward --base_model "$RUN/sft" --input_repo "$RUN/reward_data/pairs" \
    --output_dir "$RUN/reward" --batch_size 32 --epochs 3 --lr 2e-3

policy=$RUN/sft
eta=(--rebel.target_gap 3)
for t in 1 2 3; do
    folder=$RUN/iteration_$t
    run "iteration_$t/generate" rlhf_pipeline.generate --backend "$BACKEND" --model "$policy" \
        --prompts "$WORLD/prompts" --num_prompts 600 --shuffle_seed "$t" --maxlen 48 --seed $((t * 1000)) \
        --output_repo "$folder/responses"
    run "iteration_$t/rank" rlhf_pipeline.rank --input_repo "$folder/responses" --reward_model "$RUN/reward" \
        --output_repo "$folder/rewards"
    run "iteration_$t/filter" rlhf_pipeline.filter --input_repo "$folder/rewards" --model "$policy" --maxlen 48 \
        --maxlen_prompt 64 --min_responses 2 --test_size 30 --output_repo "$folder/pairs"
    start=run
    [ "$t" = 2 ] && start=launch
    $start "iteration_$t/train" rlhf_pipeline.train --base_model "$policy" --input_repo "$folder/pairs" \
        --output_dir "$folder/policy" --batch_size 32 --lr 1e-3 --max_grad_norm 1 --micro_batch_tokens 4096 "${eta[@]}"
    # iteration 1 turns the target into eta; later ones keep it, or a shrinking reward spread would inflate it
    eta=(--rebel.eta "$("$PYTHON" -c "import json; print(json.load(open('$RUN/iteration_1/policy/provenance.json'))['loss']['eta'])")")
    policy=$folder/policy
done

run evaluate rlhf_pipeline.evaluate --backend "$BACKEND" --prompts "$WORLD/prompts_heldout" --num_responses 2 --maxlen 48 \
    --policies sft="$RUN/sft" iteration_1="$RUN/iteration_1/policy" iteration_2="$RUN/iteration_2/policy" \
    iteration_3="$RUN/iteration_3/policy" --reward_models proxy="$RUN/reward" gold=rlhf_pipeline.tiny:gold \
    --output "$RUN/evaluation"
run report rlhf_pipeline.report "$RUN"
"$PYTHON" scripts/check_demo.py "$RUN"
