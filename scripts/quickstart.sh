#!/usr/bin/env bash
# The whole path of a Video-ChatGPT model on a small task, on any machine: bash scripts/quickstart.sh [--compare]
#
# Draws clips whose content is known, builds small models, converts, extracts features, trains in two stages (one of
# them killed half-way), exports, asks about clips that training never saw, and prints how many answers are right.
# Needs Python 3.11, two cores and about four minutes, and the network only to install packages, which takes minutes more.
# --compare goes on for as long again: stage 2 with shared videos and with the video first in every prompt, and a base
# that has learned the video first, to show what each of the two costs in right answers.
#
# Variables: those of environment.sh, OUT (where everything goes: quickstart/), SEED (0), and FAMILY: the shape, the kind
# of tokenizer and the prompts of the language model (llama: LLaMA 2's and LLaVA's v1; llama3, qwen3: their own).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT=${OUT:-quickstart} SEED=${SEED:-0} FAMILY=${FAMILY:-llama} SECONDS=0
case ${1:-} in
  "") compare= ;;
  --compare) compare=1 ;;
  *) echo "quickstart.sh: unknown flag $1; the only one is --compare" >&2; exit 2 ;;
esac
case $FAMILY in
  llama | llama3 | qwen3) ;;
  *) echo "quickstart.sh: unknown FAMILY $FAMILY; choose llama, llama3 or qwen3" >&2; exit 2 ;;
esac
export OMP_NUM_THREADS=1 # two processes of two threads each on two cores are four times slower

step() { printf '\n[%3d s] %s\n' "$SECONDS" "$*"; }
say_and_do() { echo "+ $*" && "$@"; }

step "environment"
source scripts/environment.sh
make_environment
rm -rf "$OUT"

step "draw clips, and write questions and answers about them"
say_and_do python scripts/quickstart/draw_clips.py "$OUT" --seed "$SEED"

step "build two vision towers, a tokenizer and an untrained language model"
say_and_do python scripts/quickstart/build_models.py "$OUT" --seed "$SEED" --family "$FAMILY"

step "extract features: with tower a for stage 1, with tower b for stage 2"
for tower in a b; do
  say_and_do python scripts/save_spatio_temporal_clip_features.py --video_dir_path "$OUT/videos" \
    --clip_feat_path "$OUT/features_$tower" --vision_tower "$OUT/tower_$tower" --num_frames 16
done

step "convert the pairs to training data"
say_and_do python scripts/convert_instruction_json_to_training_format.py --input_json_file "$OUT/videoinstruct.json" \
  --output_json_file "$OUT/train.json" --clip_feature_path "$OUT/features_a"

step "stage 1: train everything, as LLaVA was; killed half-way, then run again"
stage1=(
  torchrun --standalone --nproc_per_node=2 scripts/train.py
  --model_name_or_path "$OUT/llava_base" --version auto --data_path "$OUT/train.json" --video_folder "$OUT/features_a"
  --mm_use_vid_start_end --max_steps 500 --per_device_train_batch_size 16
  --learning_rate 1e-3 --warmup_ratio 0.05 --logging_steps 10 --save_steps 100 --save_total_limit 2 --seed "$SEED"
  --output_dir "$OUT/stage1"
)
echo "+ ${stage1[*]}"
"${stage1[@]}" &
torchrun=$!
until grep -qs '"step": 150,' "$OUT/stage1/metrics.jsonl"; do
  kill -0 $torchrun 2>/dev/null || { wait $torchrun || true; echo "stage 1 ended before it could be killed" >&2; exit 1; }
  sleep 0.2
done
ranks=$({ grep -ls "^PPid:[[:space:]]*$torchrun\$" /proc/[0-9]*/status || true; } | cut -d/ -f3)
kill -9 $torchrun $ranks # the launcher and its two ranks, all at once
wait $torchrun 2>/dev/null || true
echo
echo "killed after step 150; the same command goes on from the last checkpoint"
say_and_do "${stage1[@]}"

step "export the model"
say_and_do fastvid export --checkpoint "$OUT/stage1" --format llama --output "$OUT/llava"
say_and_do python scripts/quickstart/evaluate.py "$OUT" --name "after stage 1" \
  --model "$OUT/llava" --features "$OUT/features_a"

step "stage 2: adapt the projector alone to another tower, with PG-Video-LLaVA's flags"
say_and_do python scripts/quickstart/evaluate.py "$OUT" --name "other tower, before stage 2" \
  --model "$OUT/llava" --features "$OUT/features_b"
stage2=(
  torchrun --standalone --nproc_per_node=2 scripts/train.py
  --version auto --data_path "$OUT/train.json" --video_folder "$OUT/features_b"
  --tune_mm_mlp_adapter True --mm_use_vid_start_end --num_train_epochs 6
  --per_device_train_batch_size 16 --gradient_accumulation_steps 1 --evaluation_strategy "no"
  --save_strategy "steps" --save_steps 3000 --save_total_limit 3 --learning_rate 2e-3 --weight_decay 0.
  --warmup_ratio 0.03 --lr_scheduler_type "cosine" --logging_steps 10 --model_max_length 2048
  --gradient_checkpointing True --lazy_preprocess True --seed "$SEED"
)
say_and_do "${stage2[@]}" --model_name_or_path "$OUT/llava" --output_dir "$OUT/stage2"
say_and_do python scripts/quickstart/evaluate.py "$OUT" --name "after stage 2" \
  --model "$OUT/llava" --projector "$OUT/stage2/mm_projector.bin" --features "$OUT/features_b"

step "chat about clips that training never saw"
for clip in held_out_first_red_blue_00 held_out_left_blue_red_00; do
  question=$([[ $clip == *first* ]] && echo "Which colour comes first?" || echo "Which colour is on the left?")
  say_and_do fastvid chat --model_name_or_path "$OUT/llava" --projector "$OUT/stage2/mm_projector.bin" \
    --video "$OUT/videos/$clip.mp4" --question "$question"
done

step "results"
python scripts/quickstart/report.py "$OUT"

if [[ $compare ]]; then
  step "compare: a base that has learned the video first"
  say_and_do "${stage1[@]}" --question_order video_first --share_video True --output_dir "$OUT/stage1_video_first"
  say_and_do fastvid export --checkpoint "$OUT/stage1_video_first" --format llama --output "$OUT/llava_video_first"

  ask() { # ask NAME MODEL FEATURES [more flags]: in the order in which it was trained
    say_and_do python scripts/quickstart/evaluate.py "$OUT" --results compare.jsonl --name "$1" \
      --model "$OUT/$2" --features "$OUT/$3" "${@:4}"
  }
  ask "base of stage 1" llava features_a
  ask "base that learned video first" llava_video_first features_a

  step "compare: stage 2 with shared videos and with the video first"
  adapt() { # adapt NAME BASE ORDER [more flags]
    say_and_do "${stage2[@]}" --model_name_or_path "$OUT/$2" --question_order "$3" --output_dir "$OUT/compare/$1" "${@:4}"
    ask "$1" "$2" features_b --projector "$OUT/compare/$1/mm_projector.bin"
  }
  adapt "adapter" llava reference
  adapt "adapter, shared" llava reference --share_video True
  adapt "adapter, video first" llava video_first
  adapt "adapter, video first, shared" llava video_first --share_video True
  adapt "the same on the base that learned it" llava_video_first video_first --share_video True
  python scripts/quickstart/report.py "$OUT" --compare
fi
echo "time: $((SECONDS / 60)) min $((SECONDS % 60)) s"
