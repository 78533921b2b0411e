"""Mistakes of commands that answer, and what is done about each as the message says. {made} is the folder that
`test_remedies_inference` makes."""

from training_run import ROWS

FRAMES = ROWS - 4  # a 28-pixel tower of 14-pixel patches adds four rows
FEATURES, FILM, ASK = "--video {made}/feats/clip1.safetensors ", "--video {made}/clips/clip.mp4 ", "--question what "
ONE, ABOUT, OUT = FEATURES + ASK, FILM + ASK, "--projector {made}/out "
OF_OUT, MODEL, OTHER = "--checkpoint {made}/out ", "--model_name_or_path {made}/model ", "--model_name_or_path {made}/"
URL, PROJECTOR, HERE = "https://example.org/a", "--output {tmp}/p.bin ", "--format llama --output {tmp}/x "
UNTOLD = "--model_name_or_path {made}/llama --projector {made}/untold "

# (command, flags of a mistake, what is said, the same command as mended by each thing that it says)
MISTAKES = [
    # fastvid chat
    ("chat", ASK, "give --video: a video, a feature file, or a folder", ABOUT, ONE, "--video {made}/feats " + ASK),
    ("chat", f"--video {URL}.mp4 " + ASK, "--video .* is a URL: download the video and give its path", ABOUT),
    (
        "chat",
        ONE + "--questions_file {made}/questions.json",
        "give --question or --questions_file, not both",
        ONE,
        FEATURES + "--questions_file {made}/questions.json",
    ),
    ("chat", FEATURES + "--question ''", "--question is empty; give one", ONE),
    (
        "chat",
        "--video {made}/feats",
        "give --question or --questions_file .questions",
        "--video {made}/feats " + ASK,
        "--video {made}/feats --questions_file {made}/questions.json",
    ),
    ("chat", OTHER + "llama " + ONE, "holds no projector: give the trained one with --projector", UNTOLD + ONE),
    (
        "chat",
        UNTOLD + f"--num_frames {FRAMES} " + ABOUT,
        "names no vision tower: give --vision_tower",
        UNTOLD + f"--num_frames {FRAMES} --vision_tower {{made}}/tower_b " + ABOUT,
    ),
    (
        "chat",
        UNTOLD + f"--num_frames {FRAMES} --vision_tower {{made}}/wide " + ABOUT,
        "has 16 channels, .*: give the tower that made the features",
        UNTOLD + f"--num_frames {FRAMES} --vision_tower {{made}}/tower_b " + ABOUT,
    ),
    (
        "chat",
        UNTOLD + "--vision_tower {made}/tower_b " + ABOUT,
        f"was trained on features of {ROWS}: --num_frames {FRAMES}, or the tower",
        UNTOLD + f"--vision_tower {{made}}/tower_b --num_frames {FRAMES} " + ABOUT,
    ),
    (
        "chat",
        "--projector {made}/rows.bin --vision_tower {made}/fine " + ABOUT,
        f"on features of {ROWS}: give the tower, the frames and the pooling of training",
        "--projector {made}/rows.bin --vision_tower {made}/tower_b " + ABOUT,
    ),
    (
        "chat",
        OTHER + "other --projector {made}/theirs.bin " + ONE,
        "without them: --mm_use_vid_start_end False",
        OTHER + "other --projector {made}/theirs.bin --mm_use_vid_start_end False " + ONE,
    ),
    (
        "chat",
        "--projector {made}/cut.bin " + ONE,
        "cannot be read .*; download or write it again$",
        "--projector {made}/theirs.bin " + ONE,
    ),
    (
        "chat",
        OTHER + "other " + OUT + ONE,
        "trained on another model folder.* give that one as --model_name_or_path",
        OUT + ONE,
    ),
    ("chat", OUT + "--num_frames 100 " + ONE, "would answer wrongly; leave --num_frames out", OUT + ONE),
    ("chat", OUT + "--conv_mode pg-video-llava " + ONE, "leave --conv_mode out", OUT + ONE),
    ("chat", OUT + "--question_order reference " + ONE, "leave --question_order out", OUT + ONE),
    ("chat", OUT + "--mm_use_vid_start_end False " + ONE, "leave --mm_use_vid_start_end out", OUT + ONE),
    (
        "chat",
        OUT + "--vision_tower {made}/tower_a " + ABOUT,
        "is another tower .*tower_b .*; give that one",
        OUT + "--vision_tower {made}/tower_b " + ABOUT,
    ),
    ("chat", FEATURES + "--question '{long}'", "shorten the question", ONE),
    (
        "chat",
        "--projector {made}/theirs.bin --num_frames 600 " + ABOUT,
        "or use fewer frames",
        "--projector {made}/theirs.bin --num_frames 60 " + ABOUT,
    ),
    ("chat", "--device gpu " + ONE, "--device gpu cannot be used .*; cpu can be used", "--device cpu " + ONE),
    (
        "chat",
        "--video {made}/none " + ASK,
        "no file in it ends in one of .safetensors.*.mp4",
        "--video {made}/feats " + ASK,
    ),
    # A model's folder
    (
        "chat",
        f"--model_name_or_path {URL} " + ONE,
        "is a URL; --model_name_or_path takes a folder on this machine",
        MODEL + ONE,
    ),
    ("chat", OTHER + "model/model.safetensors " + ONE, "is a file, where a model's folder is wanted", MODEL + ONE),
    (
        "chat",
        OTHER + "models--a--b " + ONE,
        "holds 2 snapshots of the model: give one of them, such as .*/a",
        OTHER + "models--a--b/snapshots/a " + ONE,
    ),
    (
        "chat",
        OTHER + "nowhere " + ONE,
        "is no folder: download the model .hf download. and give its folder",
        MODEL + ONE,
    ),
    (
        "chat",
        OTHER + "bare " + ONE,
        "holds no tokenizer.model or tokenizer.json; --model_name_or_path takes a folder on this machine",
        MODEL + ONE,
    ),
    (
        "chat",
        OTHER + "family " + ONE,
        "has no chat template .*: give the folder of the model's instruct version",
        MODEL + ONE,
    ),
    ("chat", OTHER + "llama.cpp " + ONE, "m.gguf is of llama.cpp, .*: give the folder of the model", MODEL + ONE),
    ("chat", OTHER + "meta " + ONE, "is of Meta's release, .*: give the folder that transformers reads", MODEL + ONE),
    ("chat", OTHER + "gptq " + ONE, "quantization_config .*; give the folder of the model", MODEL + ONE),
    ("chat", OTHER + "int8 " + ONE, "quantised weights: take the folder of the model that they were made", MODEL + ONE),
    # A projector
    ("chat", f"--projector {URL} " + ONE, "--projector .* is a URL: download the file and give its path", OUT + ONE),
    (
        "chat",
        "--projector {made}/nowhere " + ONE,
        "does not exist; give a projector file, a checkpoint-N folder or the --output_dir",
        "--projector {made}/out/mm_projector.bin " + ONE,
        "--projector {made}/out/checkpoint-1 " + ONE,
        OUT + ONE,
    ),
    (
        "chat",
        "--projector {made}/model " + ONE,
        "neither a projector file .* nor a checkpoint-N folder or",
        "--projector {made}/out/mm_projector.safetensors " + ONE,
        "--projector {made}/out/checkpoint-1 " + ONE,
        OUT + ONE,
    ),
    (
        "chat",
        "--projector {made}/model/model.safetensors " + ONE,
        "it is a model's weights. Give the folder that it belongs to as --model_name_or_path",
        MODEL + ONE,
    ),
    ("chat", "--projector {made}/narrow.bin " + ONE, "or take the projector file that belongs to", OUT + ONE),
    (
        "chat",
        "--projector {made}/nan.bin " + ONE,
        "not finite .* or take weights of an earlier step",
        "--projector {made}/out/checkpoint-1 " + ONE,
    ),
    # fastvid export
    (
        "export",
        f"--checkpoint {URL} " + PROJECTOR,
        "is a URL: download the checkpoint's folder and give its path",
        OF_OUT + PROJECTOR,
    ),
    (
        "export",
        "--checkpoint {made}/model " + PROJECTOR,
        "neither a checkpoint-N folder nor an --output_dir that holds",
        "--checkpoint {made}/out/checkpoint-1 " + PROJECTOR,
        OF_OUT + PROJECTOR,
    ),
    (
        "export",
        OF_OUT + OTHER + "other " + PROJECTOR,
        "other ids .* give the folder that training started from .--model_name_or_path",
        OF_OUT + MODEL + PROJECTOR,
    ),
    (
        "export",
        "--checkpoint {made}/full " + OTHER + "shallow " + HERE,
        r"which does not fit .*: give the folder that "
        r"training started from \(--model_name_or_path\)",
        "--checkpoint {made}/full " + MODEL + HERE,
    ),
    ("export", OF_OUT + "--format llama --output {made}/model", "made of; choose another folder", OF_OUT + HERE),
    (
        "export",
        OF_OUT + "--format llama --output {made}/feats",
        "is not an export of fastvid's; choose another folder",
        OF_OUT + HERE,
    ),
    (
        "export",
        OF_OUT + "--output {tmp}/p.pt",
        "a projector file ends in .bin .* or .safetensors",
        OF_OUT + "--output {tmp}/p.bin",
        OF_OUT + "--output {tmp}/p.safetensors",
    ),
    (
        "export",
        "--checkpoint {made}/untold --format llava --output {tmp}/x",
        "names none: give --vision_tower",
        "--checkpoint {made}/untold --format llava --output {tmp}/x --vision_tower {made}/tower_b",
    ),
    (
        "export",
        "--checkpoint {made}/untold --format llava --output {tmp}/x --vision_tower {made}/wide",
        "has 16 channels, .*: give the tower that made the features",
        "--checkpoint {made}/untold --format llava --output {tmp}/x --vision_tower {made}/tower_b",
    ),
    (
        "export",
        OF_OUT + HERE + "--vision_tower {made}/tower_a",
        "is another tower .*tower_b .*; give that one",
        OF_OUT + HERE + "--vision_tower {made}/tower_b",
    ),
    # A tower
    ("extract", f"--vision_tower {URL}", "is a URL; give the tower's folder", "--vision_tower {made}/tower_b"),
    (
        "extract",
        "--vision_tower {made}/tower_b/model.safetensors",
        "is a file; give the tower's folder",
        "--vision_tower {made}/tower_b",
    ),
    ("extract", "--vision_tower {made}/nowhere", "no such folder; give the tower's", "--vision_tower {made}/tower_b"),
    (
        "extract",
        "--vision_tower {made}/none",
        "cannot load the vision tower .*and pass --vision_tower FOLDER",
        "--vision_tower {made}/tower_b",
    ),
    # fastvid train and inspect
    (
        "train",
        "--max_steps 1 --vision_tower {made}/tower_a",
        "leave the flag out, or give that one",
        "--max_steps 1",
        "--max_steps 1 --vision_tower {made}/tower_b",
    ),
    (
        "train",
        "--max_steps 1 --pretrain_mm_mlp_adapter {made}/out --mm_projector_type linear",
        "holds a mlp2x_gelu projector, --mm_projector_type linear asks for another",
        "--max_steps 1 --pretrain_mm_mlp_adapter {made}/out --mm_projector_type mlp2x_gelu",
    ),
    ("inspect", "--index 12", "the data hold records 0 to 11", "--index 11", "--index 0"),
]
