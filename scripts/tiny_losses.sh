#!/usr/bin/env bash
# Every loss on the same pairs of the tiny world, from the same policy, with the same seeds, evaluated on the same prompts:
# one table, of proxy, gold, KL and length with intervals over the seeds. About 20 minutes on two CPU cores. Run again
# after any interruption, it goes on where it stood. docs/losses.md shows the table.
#
#     RUN=runs/tiny_losses scripts/tiny_losses.sh
#     SIZE=ci LOSSES="rebel dpo" SEEDS="1 2" RUN=runs/few_losses scripts/tiny_losses.sh
set -euo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python}
SIZE=${SIZE:-demo}
RUN=${RUN:-runs/tiny_losses}
LOSSES=${LOSSES:-rebel dpo ipo simpo kto orpo sppo}
SEEDS=${SEEDS:-1 2 3}
BACKEND=${BACKEND:-transformers} # so small a model answers before vLLM has started
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
case $SIZE in
    demo) recipe=tiny train=(--batch_size 32 --lr 1e-3) responses=2 ;;
    ci) recipe=tiny_ci train=(--batch_size 20 --lr 2e-3) responses=1 ;;
    *) echo "SIZE is demo or ci, not $SIZE" >&2; exit 2 ;;
esac

# Settings at which every loss ends at a KL of about 1 nat; all else is the same for all.
settings() {
    case $1 in
        rebel) echo --rebel.target_gap 3 ;;
        dpo) echo --dpo.beta 0.1 ;;
        ipo) echo --ipo.beta 0.5 ;;
        simpo) echo --simpo.beta 2.5 --simpo.gamma_beta_ratio 0.3 ;;
        kto) echo --kto.beta 0.1 ;;
        orpo) echo --orpo.odds_weight 1 ;;
        sppo) echo --sppo.beta 0.1 ;;
        *) echo "LOSSES has no settings for $1" >&2; exit 2 ;;
    esac
}

# The start: a world, a policy that has seen demonstrations, a reward model, and the pairs of one iteration.
"$PYTHON" -m rlhf_pipeline.iterate --recipe "scripts/recipes/$recipe.yaml" --output "$RUN/start" \
    --before.generate.backend "$BACKEND" --generate.backend "$BACKEND" --to iteration_1/filter

policies=("start=$RUN/start/sft")
for loss in $LOSSES; do
    words=$(settings "$loss")
    for seed in $SEEDS; do
        "$PYTHON" -m rlhf_pipeline.train --input_repo "$RUN/start/iteration_1/pairs" --base_model "$RUN/start/sft" \
            --output_dir "$RUN/${loss}_$seed" --loss "$loss" $words "${train[@]}" --seed "$seed" \
            --max_grad_norm 1 --micro_batch_tokens 4096 --save_every 0
        policies+=("${loss}_$seed=$RUN/${loss}_$seed")
    done
done

"$PYTHON" -m rlhf_pipeline.evaluate --policies "${policies[@]}" --output "$RUN/evaluation" \
    --prompts "$RUN/start/world/prompts_heldout" --num_responses $responses --maxlen 48 --backend "$BACKEND" \
    --reward_models "proxy=$RUN/start/reward" gold=rlhf_pipeline.tiny:gold
"$PYTHON" scripts/losses_table.py "$RUN/evaluation/results.json"
