#!/usr/bin/env bash
# Adapter training of a LLaVA-1.5 model on VideoInstruct-100K, as PG-Video-LLaVA does it.
#
#   bash scripts/launch_train.sh [more flags of fastvid train]      (under Slurm: scripts/launch_train.slurm)
#
# Every setting can be given from the environment: MODEL=… DATA=… bash scripts/launch_train.sh --max_steps 100
# Several machines: run it on each, with the same NNODES and RDZV_ENDPOINT (host:port of any one of them).
set -euo pipefail

MODEL=${MODEL:-checkpoints/llava-v1.5-7b}          # starting weights and tokenizer
DATA=${DATA:-data/video_chatgpt_training.json}     # from scripts/convert_instruction_json_to_training_format.py
FEATURES=${FEATURES:-data/features}                # from scripts/save_spatio_temporal_clip_features.py
OUTPUT=${OUTPUT:-output/pg-video-llava-7b}         # checkpoints, metrics, mm_projector.bin; a rerun resumes from here

NPROC_PER_NODE=${NPROC_PER_NODE:-4}                # GPUs per machine
NNODES=${NNODES:-1}
RDZV_ENDPOINT=${RDZV_ENDPOINT:-localhost:29001}
MAX_RESTARTS=${MAX_RESTARTS:-3}                    # times that the job goes on from its last checkpoint when a rank dies
# Seconds from a stop signal to the end of the step in hand and its checkpoint. (Ranks whose peer died do not wait.)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
# NCCL's last collectives are kept, and written to a file when one of them times out (see TORCH_FR_DUMP_TEMP_FILE).
export TORCH_FR_BUFFER_SIZE=${TORCH_FR_BUFFER_SIZE:-${TORCH_NCCL_TRACE_BUFFER_SIZE:-2000}}
export TORCH_NCCL_DUMP_ON_TIMEOUT=${TORCH_NCCL_DUMP_ON_TIMEOUT:-1}

EPOCHS=${EPOCHS:-3}
said=${BATCH:-}${ACCUMULATION:-}                   # what a batch is, if anybody says it
BATCH=${BATCH:-8}                                  # samples per GPU and micro-batch; not given: as below
ACCUMULATION=${ACCUMULATION:-1}
LEARNING_RATE=${LEARNING_RATE:-2e-5}
SAVE_STEPS=${SAVE_STEPS:-3000}

if ((NNODES == 1)); then
  rendezvous=(--master_port "${RDZV_ENDPOINT##*:}")
else
  rendezvous=(--nnodes "$NNODES" --rdzv_backend c10d --rdzv_endpoint "$RDZV_ENDPOINT" --rdzv_id "${RDZV_ID:-fastvid}")
fi

# Batches that fill the card, in the place of eight samples, where nobody says what a batch is.
for flag in "$@"; do
  flag=${flag%%=*}
  case ${flag//-/_} in
    __tokens_per_batch | __rows_per_batch | __per_device_train_batch_size | __config | __parity | \
      __gradient_accumulation_steps) said=1 ;;
  esac
done
budget=()
[[ -n $said ]] || budget=(--tokens_per_batch auto)

flags=(
  --model_name_or_path "$MODEL" \
  --version v1 \
  --data_path "$DATA" \
  --video_folder "$FEATURES" \
  --tune_mm_mlp_adapter True \
  --mm_use_vid_start_end \
  --bf16 True \
  --output_dir "$OUTPUT" \
  --num_train_epochs "$EPOCHS" \
  --per_device_train_batch_size "$BATCH" \
  --per_device_eval_batch_size "$BATCH" \
  --gradient_accumulation_steps "$ACCUMULATION" \
  --evaluation_strategy "no" \
  --save_strategy "steps" \
  --save_steps "$SAVE_STEPS" \
  --save_total_limit 3 \
  --learning_rate "$LEARNING_RATE" \
  --weight_decay 0. \
  --warmup_ratio 0.03 \
  --lr_scheduler_type "cosine" \
  --logging_steps 100 \
  --tf32 True \
  --model_max_length 2048 \
  --gradient_checkpointing True \
  --lazy_preprocess True \
  ${budget[@]+"${budget[@]}"} "$@"
)

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# A wrong flag is told at once; what else a restart does not mend is kept in a file, where torchrun's restarts find it and
# end. It is told again when torchrun has ended, below its own report: then the other end of descriptor 9 is closed.
python3 -c 'import sys; sys.path.insert(0, sys.argv.pop(1)); from fastvid import flags; flags.parse(flags.config_of("train"))' \
  "$here/.." "${flags[@]}"
[[ -z ${CHECK_ONLY:-} ]] || exit 0                 # launch_align.sh asks before it extracts
FASTVID_MISTAKE=$(mktemp -d)/mistake
export FASTVID_MISTAKE
exec 9> >(trap "" INT TERM HUP; cat; [[ ! -f $FASTVID_MISTAKE ]] || cat "$FASTVID_MISTAKE" >&2; rm -rf "${FASTVID_MISTAKE%/*}")
exec torchrun --nproc_per_node "$NPROC_PER_NODE" --max_restarts "$MAX_RESTARTS" "${rendezvous[@]}" "$here/train.py" "${flags[@]}"
