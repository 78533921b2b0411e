#!/usr/bin/env bash
# Stage 1 of a new pair of language model and vision tower: a new projector learns to show images to the language model,
# which stays as it is. Stage 2 is scripts/launch_train.sh, on videos, from this projector (docs/train.md).
#
#   bash scripts/launch_align.sh [more flags of fastvid train]
#
# Every setting can be given from the environment, those of launch_train.sh (GPUs, machines, batches) included:
#   MODEL=checkpoints/Qwen3-4B TOWER=google/siglip-so400m-patch14-384 bash scripts/launch_align.sh
# A rerun makes only the features that are missing, and resumes the training.
set -euo pipefail

export MODEL=${MODEL:-checkpoints/vicuna-7b-v1.5}  # a language model, without a projector
TOWER=${TOWER:-openai/clip-vit-large-patch14-336}  # CLIP, SigLIP, DINOv2 or DINOv3: a folder or hub id
IMAGES=${IMAGES-data/LLaVA-Pretrain}               # folder of the images; empty: FEATURES are there already
export DATA=${DATA:-data/LLaVA-Pretrain/blip_laion_cc_sbu_558k.json}
export FEATURES=${FEATURES:-data/LLaVA-Pretrain-features}
export OUTPUT=${OUTPUT:-output/align}              # mm_projector.bin is made here, for stage 2
DECODE_WORKERS=${DECODE_WORKERS:-}                 # processes that decode; default: one a core
PROJECTOR=${PROJECTOR:-mlp2x_gelu}

export NPROC_PER_NODE=${NPROC_PER_NODE:-4} NNODES=${NNODES:-1}
export EPOCHS=${EPOCHS:-1} BATCH=${BATCH:-64} LEARNING_RATE=${LEARNING_RATE:-1e-3} SAVE_STEPS=${SAVE_STEPS:-500}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
training=(bash "$here/launch_train.sh" --version auto --mm_projector_type "$PROJECTOR" "$@")
CHECK_ONLY=1 "${training[@]}"  # a wrong flag is told before hours of extraction
if [[ -n $IMAGES ]]; then
  extraction=(
    --images True --video_dir_path "$IMAGES" --clip_feat_path "$FEATURES" --vision_tower "$TOWER"
    ${DECODE_WORKERS:+--decode_workers "$DECODE_WORKERS"}
  )
  # Machines and processes share the work through the folder of features; it ends when all of it is done.
  torchrun --nproc_per_node "$NPROC_PER_NODE" --master_port "${EXTRACT_PORT:-29011}" \
    "$here/save_spatio_temporal_clip_features.py" "${extraction[@]}"
fi
exec "${training[@]}"
