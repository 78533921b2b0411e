"""Flags of other trainers that people paste: what they mean here.

`MEANING` holds every flag that fastvid has not of the reference's and Video-ChatGPT's ``train.py``, of
``transformers.TrainingArguments`` (4.28 to 5.23), and the best known of LLaVA's and of other trainers. Most of them
change nothing here, or nothing at the value that scripts give them; with any other value they are refused, with what to
do instead. `SYNONYMS` are other words for flags that fastvid has, `VALUES` for values of those.
"""

from collections.abc import Sequence
from typing import NamedTuple

# What says "no" in any of them.
_OFF = {"", "false", "no", "n", "f", "off", "none", "null", "[]", "{}", "()"}


class Meaning(NamedTuple):
    """What a flag means here.

    Attributes:
        remedy: what to do instead, where its value would change the result; "": no value would.
        harmless: values, in lower case, that change nothing, beside those that say no and a zero.
        note: what to know about it though it changes nothing.
        zero: whether 0 says no.
        inverted: it is "no" that would change the result, and nothing else.
    """

    remedy: str = ""
    harmless: tuple[str, ...] = ()
    note: str = ""
    zero: bool = True
    inverted: bool = False

    def refuses(self, words: Sequence[str]) -> bool:
        """Whether the flag cannot be had with this value: the words after it, of which none stand for True."""
        value = " ".join(words).strip().lower() if words else "true"
        if self.inverted:
            return value in _OFF or value == "0"
        if not self.remedy or value in _OFF or value in self.harmless:
            return False
        try:
            return float(value) != 0 or not self.zero
        except ValueError:
            return True


def _without_effect(names, note=""):
    return {name: Meaning(note=note) for name in names.split()}


_LORA = "use --lora_enable True, with --lora_r, --lora_alpha and --lora_targets"
_TARGETS = "use --lora_targets: all, attention, mlp, or names such as q_proj"
_QLORA = "use --lora_enable True --frozen_dtype nf4"
_SHARD = "leave it out: --shard auto (or full, hybrid) shards a model over ranks"
_LENGTH = "leave it out: --tokens_per_batch N fills batches without padding"
_HUB = "leave it out; when the run has ended, fastvid export --push_to_hub True uploads what it trained"
_FP16 = "use --bf16 True"
_IMAGES = "give --video_folder, where features of images lie beside those of videos (fastvid extract --images True)"
_DEVICE = "fastvid computes on CUDA GPUs and CPUs, leave it out"
_CPU = "leave it out, and hide the GPUs: CUDA_VISIBLE_DEVICES= fastvid train …"
_NO_SUCH = "fastvid has nothing like it, leave it out"
_TOWER = "the vision tower is not trained: its features are extracted before training, leave it out"

MEANING = {
    # The reference's own, which its train.py overwrites or never reads.
    **_without_effect("is_multimodal video_token_len frame_aspect_ratio cache_dir force_fsdp"),
    "sep_video_conv_front": Meaning("use --question_order video_first"),
    # Where and how transformers logs, evaluates, saves and loads, which computes nothing else.
    **_without_effect("""
        remove_unused_columns logging_first_step logging_strategy logging_nan_inf_filter log_level log_level_replica
        log_on_each_node do_train do_eval do_predict prediction_loss_only eval_accumulation_steps eval_delay
        eval_on_start eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_inputs_for_metrics
        include_for_metrics include_tokens_per_second include_num_input_tokens_seen label_names past_index
        use_legacy_prediction_loop metric_for_best_model greater_is_better save_safetensors save_on_each_node
        save_only_model enable_jit_checkpoint restore_callback_states_from_checkpoint
        hub_model_id hub_strategy hub_token hub_private_repo hub_always_push hub_revision push_to_hub_model_id
        push_to_hub_organization push_to_hub_token trackio_space_id trackio_bucket_id trackio_static_space_id
        dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_in_order
        dataloader_multiprocessing_context dispatch_batches length_column_name
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend local_rank
        fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap
        fp16_opt_level fp16_backend half_precision_backend bf16_full_eval use_cache
        use_liger_kernel liger_kernel_config torch_empty_cache_steps torch_compile_backend torch_compile_mode
        jit_mode_eval skip_memory_metrics debug tpu_metrics_debug ray_scope _n_gpu xpu_backend"""),
    "average_tokens_across_devices": Meaning(
        note="a step's loss is the mean over its tokens on all ranks, --parity reference averages means"
    ),
    "logging_dir": Meaning(note="TensorBoard's files lie in --output_dir/tensorboard"),
    "overwrite_output_dir": Meaning(note="--resume never starts over"),
    "activation_checkpointing": Meaning(note="--recompute auto recomputes where memory is short"),
    **_without_effect(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        "--recompute auto recomputes where memory is short",
    ),
    "resume_from_checkpoint": Meaning(
        "the same command goes on from the newest checkpoint in --output_dir by itself (--resume auto), leave it out",
        ("true", "yes", "1"),
        "the newest checkpoint in --output_dir is taken by itself",
    ),
    # What would change the result.
    "fp16": Meaning(_FP16),
    "fp16_full_eval": Meaning("validation computes as training does: --bf16 True"),
    "deepspeed": Meaning(_SHARD),
    "fsdp": Meaning(_SHARD),
    "sharded_ddp": Meaning(_SHARD),
    "parallelism_config": Meaning(_SHARD),
    "mp_parameters": Meaning(_SHARD),
    "accelerator_config": Meaning(_NO_SUCH),
    "torch_compile": Meaning("leave it out: fastvid brings kernels of its own"),
    "torchdynamo": Meaning("leave it out: fastvid brings kernels of its own"),
    "push_to_hub": Meaning(_HUB),
    "auto_find_batch_size": Meaning(
        "give --per_device_train_batch_size or --tokens_per_batch, --recompute auto makes a step fit into memory"
    ),
    "per_gpu_train_batch_size": Meaning("use --per_device_train_batch_size"),
    "per_gpu_eval_batch_size": Meaning("use --per_device_eval_batch_size"),
    "split_batches": Meaning("leave it out: --per_device_train_batch_size is each rank's"),
    "label_smoothing_factor": Meaning(_NO_SUCH),
    "lr_scheduler_kwargs": Meaning("use --min_lr_ratio and --decay_steps"),
    "optim_target_modules": Meaning(_NO_SUCH),
    "optim_args": Meaning("use --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay"),
    "adafactor": Meaning("use --optim adamw_8bit, whose moments are small too"),
    "group_by_length": Meaning(_LENGTH),
    "train_sampling_strategy": Meaning(_LENGTH, ("random",)),
    "dataloader_drop_last": Meaning("leave it out: a batch goes on over an epoch's end, so none is incomplete"),
    "ignore_data_skip": Meaning("leave it out: a resumed run goes on with the samples that come next"),
    "data_seed": Meaning("use --seed, which decides the order of samples too", zero=False),
    "load_best_model_at_end": Meaning(
        "leave it out: metrics.jsonl tells the best eval_loss, and fastvid export "
        "--checkpoint OUTPUT_DIR/checkpoint-N makes its weights"
    ),
    "no_cuda": Meaning(_CPU),
    "use_cpu": Meaning(_CPU),
    "device": Meaning(_CPU),
    "use_mps_device": Meaning(_DEVICE),
    "tpu_num_cores": Meaning(_DEVICE),
    "use_ipex": Meaning(_DEVICE),
    # LLaVA's and its forks'.
    **_without_effect(
        "mm_use_im_patch_token image_aspect_ratio image_grid_pinpoints mm_patch_merge_type double_quant mpt_attn_impl"
    ),
    "quant_type": Meaning("use --frozen_dtype nf4", ("nf4",)),
    "lora_bias": Meaning("leave it out: biases stay as they are"),
    "lora_weight_path": Meaning("use --lora_weights FOLDER"),
    "use_dora": Meaning(_NO_SUCH),
    "lora_rank": Meaning("use --lora_r"),
    **dict.fromkeys(
        "lora_target target_modules lora_modules lora_target_modules".split(), Meaning(_TARGETS, ("all", "all-linear"))
    ),
    "modules_to_save": Meaning("leave it out: the projector and the start and end embeddings are trained beside LoRA"),
    **dict.fromkeys("adapter_name_or_path adapters resume_adapter".split(), Meaning("use --lora_weights FOLDER")),
    "use_lora": Meaning(_LORA),
    "lora": Meaning(_LORA),
    "use_peft": Meaning(_LORA),
    "use_qlora": Meaning(_QLORA),
    "qlora": Meaning(_QLORA),
    "finetuning_type": Meaning(_LORA, ("full",)),
    "mm_vision_tower_lr": Meaning(_TOWER),
    "vision_tower_lr": Meaning(_TOWER),
    "unfreeze_mm_vision_tower": Meaning(_TOWER),
    "tune_vision_tower": Meaning(_TOWER),
    "mm_tunable_parts": Meaning(
        "use --tune_mm_mlp_adapter True for the projector, everything is trained without it",
        ("mm_mlp_adapter,mm_language_model",),
    ),
    "mm_vision_select_layer": Meaning("fastvid extract takes layer -2, leave it out", ("-2",), zero=False),
    "mm_vision_select_feature": Meaning("fastvid extract takes the patches, leave it out", ("patch",)),
    "mm_use_im_start_end": Meaning("use --mm_use_vid_start_end True"),
    "group_by_modality_length": Meaning(_LENGTH),
    "image_folder": Meaning(_IMAGES),
    "image_tower": Meaning(_IMAGES),
    "bits": Meaning("use --frozen_dtype nf4 (4 bits) or int8 (8)", ("16", "32")),
    "load_in_4bit": Meaning("use --frozen_dtype nf4"),
    "load_in_8bit": Meaning("use --frozen_dtype int8"),
    "quantization_bit": Meaning("use --frozen_dtype nf4 (4 bits) or int8 (8)"),
    "mm_newline_position": Meaning(_NO_SUCH),
    "mm_resampler_type": Meaning(_NO_SUCH),
    "mm_spatial_pool_mode": Meaning(_NO_SUCH),
    "mm_spatial_pool_stride": Meaning(_NO_SUCH),
    "add_time_instruction": Meaning(_NO_SUCH),
    "unfreeze_language_model": Meaning(
        "leave it out: the decoder is trained unless --tune_mm_mlp_adapter True or --freeze_backbone True"
    ),
    **_without_effect("verbose_logging"),
    # LLaMA-Factory's and ms-swift's.
    **_without_effect("""
        preprocessing_num_workers preprocessing_batch_size overwrite_cache plot_loss trust_remote_code dataset_num_proc
        use_fast_tokenizer use_hf lazy_tokenize load_from_cache_file check_model model_author model_revision
        quant_method image_max_pixels image_min_pixels padding_free"""),
    **dict.fromkeys("freeze_vision_tower freeze_vit".split(), Meaning(_TOWER, inverted=True)),
    **dict.fromkeys("train_type tuner_type sft_type".split(), Meaning(_LORA, ("full",))),
    **dict.fromkeys(
        """video_fps fps fps_max_frames nframes frames_upbound max_frames_num video_maxlen video_max_pixels
                    force_sample""".split(),
        Meaning("leave it out: fastvid extract --num_frames decides which frames are seen"),
    ),
    **dict.fromkeys(
        "val_size split_dataset_ratio".split(), Meaning("give the records to validate on to --eval_data_path")
    ),
    "stage": Meaning("fastvid trains on the answers given (sft), leave it out", ("sft",)),
    "max_samples": Meaning("use --data_weights, which takes a share of each file"),
    "dataset_dir": Meaning("give --data_path the paths of the files"),
    "system": Meaning("leave it out: the template has a system text of its own"),
    "neat_packing": Meaning(_LENGTH),
    "deepspeed_config": Meaning(_SHARD),
    "nproc_per_node": Meaning("give it to torchrun: torchrun --nproc_per_node N -m fastvid.train …"),
    "num_gpus": Meaning("start ranks with torchrun: torchrun --nproc_per_node N -m fastvid.train …", ("1",)),
}

# Another word: flags of fastvid, of which the first that the command has is meant.
SYNONYMS = {
    word: flags.split()
    for words, flags in {
        "epochs num_epochs epoch max_epochs n_epochs": "num_train_epochs",
        "steps num_steps total_steps train_steps num_training_steps": "max_steps",
        "batch_size train_batch_size bs micro_batch_size batch": "per_device_train_batch_size infer_batch",
        "eval_batch_size val_batch_size": "per_device_eval_batch_size",
        "grad_accum accumulation_steps gradient_accumulation grad_accumulation_steps accum_steps "
        "accumulate_grad_batches": "gradient_accumulation_steps",
        "lr base_lr peak_lr": "learning_rate",
        "wd decay": "weight_decay",
        "beta1": "adam_beta1",
        "beta2": "adam_beta2",
        "eps epsilon adam_eps": "adam_epsilon",
        "clip_grad grad_clip gradient_clip_val max_norm clip": "max_grad_norm",
        "warmup": "warmup_ratio",
        "num_warmup_steps": "warmup_steps",
        "scheduler lr_scheduler lr_schedule": "lr_scheduler_type",
        "optimizer": "optim",
        "max_length max_seq_length max_seq_len cutoff_len seq_length seq_len tokenizer_model_max_length "
        "context_length": "model_max_length max_new_tokens",
        "max_tokens max_output_tokens": "max_new_tokens",
        "model model_path model_name base_model pretrained_model_name_or_path model_dir model_id "
        "llm": "model_name_or_path",
        "data dataset train_file train_data data_dir dataset_path train_path annotations json": "data_path "
        "input_json_file questions_file",
        "eval_data val_data eval_file validation_file eval_path val_path": "eval_data_path",
        "features feature_folder features_folder feature_path feature_dir clip_feature_folder": "video_folder "
        "clip_feature_path clip_feat_path",
        "videos video_dir video_path videos_dir": "video_dir_path video video_folder",
        "output out output_path save_dir save_path out_dir": "output_dir output output_json_file clip_feat_path",
        "output_dir": "output clip_feat_path output_json_file",
        "input input_path ckpt checkpoint_path": "checkpoint input_json_file video_dir_path pretrain_mm_mlp_adapter",
        "checkpoint_dir": "checkpoint output_dir",
        "resume_training": "resume",
        "workers num_workers n_workers dataloader_workers": "dataloader_num_workers decode_workers",
        "precision torch_dtype dtype mixed_precision amp half fp16 float16 bf16 use_bf16 bfloat16": "bf16 dtype",
        "quantization quantize quant": "frozen_dtype",
        "attention attn attn_impl attention_implementation flash_attn use_flash_attn use_flash_attention "
        "use_flash_attention_2": "attn_implementation",
        "wandb use_wandb report log_with logger tensorboard": "report_to",
        "wandb_project project_name": "project",
        "wandb_name wandb_run_name name exp_name experiment_name": "run_name",
        "template conv_template conv_version prompt_template chat_template": "version conv_mode",
        "prompt query text questions": "question",
        "images image video_file": "video",
        "clip tower mm_vision_tower vision_encoder clip_model video_tower": "vision_tower",
        "frames n_frames num_segments max_frames": "num_frames",
        "projector mm_projector pretrain_projector mm_projector_path": "projector pretrain_mm_mlp_adapter",
        "freeze_multi_modal_projector freeze_aligner freeze_projector": "freeze_mm_mlp_adapter",
        "freeze_llm freeze_language_model tune_projector": "tune_mm_mlp_adapter",
        "lora lora_path lora_adapter adapter peft peft_path adapter_path": "adapter lora_weights",
        "random_seed": "seed",
        "device_map": "device shard",
        "zero_stage": "shard",
        "save_limit": "save_total_limit",
        "log_interval log_every logging_interval": "logging_steps",
        "save_interval save_every": "save_steps",
        "eval_interval eval_every": "eval_steps",
        "packing pack": "tokens_per_batch",
    }.items()
    for word in words.split()
}

# Another word: values of fastvid's flags.
VALUES = {
    "optim": {"adamw_hf": "adamw", "adamw_apex_fused": "adamw", "adamw_bnb_8bit": "adamw_8bit"},
    "attn_implementation": {
        "flash_attention_2": "flash",
        "flash_attention_3": "flash",
        "flash_attention_4": "flash",
        "eager": "sdpa",
    },
    "report_to": {"[]": "none"},
}
