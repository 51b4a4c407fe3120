#!/usr/bin/env bash
# The tutorial's run, flag for flag: Llama-3-8B-Instruct, UltraFeedback prompts, ArmoRM, one iteration of REBEL on 8 GPUs.
#
#     OWNER=your-hub-account scripts/llama3_armo.sh        data on the Hub, private
#     OWNER=./data scripts/llama3_armo.sh                  data in local folders
#
# Run it again after any interruption: every stage goes on where it stood. VLLM_PYTHON and TRAIN_PYTHON choose the
# environments of envs/vllm_env.yml and envs/rebel_env.yml where there are two.
set -euo pipefail
cd "$(dirname "$0")/.."

OWNER=${OWNER:?set OWNER to your Hub account, or to ./data for local folders}
NUM_GPU=${NUM_GPU:-8}
OUTPUT_REPO=$OWNER/${NAME:-ultrafeedback-llama3}
OUTPUT_DIR=${OUTPUT_DIR:-models/rebel-llama3-armo-iter-1}
VLLM_PYTHON=${VLLM_PYTHON:-python}
TRAIN_PYTHON=${TRAIN_PYTHON:-python}

set -x # show each command as it can be repeated by hand

"$VLLM_PYTHON" -m rlhf_pipeline.generate --world_size "$NUM_GPU" --output_repo "$OUTPUT_REPO"

"$TRAIN_PYTHON" -m rlhf_pipeline.rank --input_repo "$OUTPUT_REPO"

"$TRAIN_PYTHON" -m rlhf_pipeline.filter --input_repo "${OUTPUT_REPO}_armo"

"$TRAIN_PYTHON" -m accelerate.commands.launch --config_file accelerate_cfgs/deepspeed_config_stage_3.yaml \
    --main_process_port 29080 --num_processes "$NUM_GPU" -m rlhf_pipeline.train \
    --task.input_repo "${OUTPUT_REPO}_armo_tokenized" --output_dir "$OUTPUT_DIR"
