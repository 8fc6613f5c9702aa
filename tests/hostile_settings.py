"""Cases of test_hostile.py: options, argument files, the environment, logs and places to write to."""

import json
import os
import shutil

from hostile_case import Case

TRAIN = "main_lgssl.py --data_path {data} --output_dir {here}/out {tiny}"
MODEL = "--pretrained_weights {weights} --num_workers 0 --crop_size 32"
KNN = f"eval_knn.py --data_path {{data}} --output_dir {{here}}/out --nb_knn 1 {MODEL}"
LINEAR = f"eval_linear.py --data_path {{data}} --output_dir {{here}}/out --epochs 1 {MODEL}"
FEATURES = f"extract_features.py --data_path {{data}} --output {{here}}/f.npz {MODEL}"
MATCHES = "visualize.py matches coffee --patch_size 16 --output {here}/m.png"
MAP = "visualize.py map --data_path {data} --pretrained_weights {weights} --num_workers 0 --perplexity 1000000"
MAP += " --output {here}/m.png"
PLOT = "plot_runs.py {here}/run --output {here}/runs.png"
RECIPE = "runs/cifar10_vit_tiny16_mean"  # folder of a run of reproduce.py
NOT_RUN = r"(?s)\A(?!.*\| [\d.]+ / (?!not run))"  # no number of ours in any table
NOT_BEGUN = "mean +cifar10_vit_tiny16_mean +pretraining 0%"
LONG = "n" * 5000


def text_file(name, contents):
    """Return a function that writes a file below {here}. Bytes and text are written as they are."""

    def make(here, places):
        path = here / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = contents(here, places) if callable(contents) else contents
        path.write_bytes(data if isinstance(data, bytes) else data.encode())

    return make


def arguments(contents):
    """Return a function that writes the argument file {here}/a.args."""
    return text_file("a.args", contents)


def folder(name):
    return lambda here, places: (here / name).mkdir(parents=True)


def copied_run(*changes, to="run"):
    """Return a function that copies a finished run below {here} and changes it. Each change gets the run's folder."""

    def make(here, places):
        shutil.copytree(places["run"], here / to)
        for change in changes:
            change(here / to)

    return make


def log(*lines, name="log.txt"):
    """Return a change of a run: its log with these lines. Values that are no text or bytes are written as JSON."""

    def change(run):
        data = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        (run / name).write_bytes(b"".join(line + b"\n" for line in data))

    return change


def run_arguments(**changes):
    """Return a change of a run: other values in its args.json."""

    def change(run):
        path = run / "args.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def replaced_by_folder(name):
    def change(run):
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return change


def pipe(here, places):
    (here / "out").mkdir()
    os.mkfifo(here / "out/environment.jsonl")


def tensorboard_is_a_file(here, places):
    (here / "out").mkdir()
    (here / "out/tb").write_text("")


def included_twice(here, places):
    """25 files, each of which includes the next one twice."""
    for i in range(25):
        (here / f"{i}.args").write_text(f"@{i + 1}.args @{i + 1}.args")
    (here / "25.args").write_text("--epochs 1")


def linked_to_itself(here, places):
    (here / "a.args").write_text("@b.args")
    (here / "b.args").symlink_to("a.args")


def result(contents):
    """Return a function that writes the result of an evaluation where reproduce.py expects it."""
    return text_file("runs/cifar10_vit_tiny16_mean/knn_cifar10.json", json.dumps(contents))


# Options of the pretraining: name, options, message
OPTIONS = [
    ("unknown option", "--lrr 1", r"unknown option --lrr; did you mean --lr\?"),
    ("unknown option without a similar one", "--quux", "unknown option --quux; --help lists the options"),
    ("abbreviated option", "--epoch 3", r"did you mean --epochs\?"),
    ("stray word", "mean", "unknown option mean"),
    ("option without value", "--epochs", "--epochs: expected one argument"),
    ("no epochs", "--epochs 0", "--epochs: found '0', expected a whole number in"),
    ("negative epochs", "--epochs -3", "--epochs: found '-3'"),
    ("half an epoch", "--epochs 1.5", "found '1.5', expected a whole number"),
    ("epochs in words", "--epochs ten", "found 'ten', expected a whole number"),
    ("10^18 epochs", f"--epochs {10**18}", r"found '10{18}', expected a whole number in \[1, "),
    ("5,000 digits", f"--epochs {'9' * 5000}", "expected a whole number in"),
    ("seed of 10^30", f"--seed {10**30}", r"found '10{30}', expected a whole number in \[0, 9223372036854775807\]"),
    ("negative seed", "--seed -1", "found '-1'"),
    ("lr nan", "--lr nan", "--lr: found 'nan', expected a number of at least 0"),
    ("lr inf", "--lr inf", r"--lr: found 'inf', expected a number in \[0, 1000000000.0\]"),
    ("lr 1e300", "--lr 1e300", r"--lr: found '1e300', expected a number in \[0, 1000000000.0\]"),
    ("lr with a comma", "--lr 0,001", "found '0,001', expected a number"),
    ("momentum above 1", "--momentum_teacher 2", r"found '2', expected a number in \[0, 1\]"),
    ("temperature 0", "--teacher_temp 0", "--teacher_temp: found '0', expected a number of at least 1e-06"),
    ("temperature 1e-300", "--warmup_teacher_temp 1e-300", "found '1e-300'"),
    ("one prototype", "--out_dim 1", "--out_dim: found '1', expected a whole number in"),
    ("patches of 0 pixels", "--patch_size 0", "--patch_size: found '0'"),
    (
        "crops that are no multiple of a patch",
        "--local_crops_size 18",
        "is not a multiple of --patch_size 8; the nearest is 16",
    ),
    ("crop scale of one number", "--global_crops_scale 0.4", "--global_crops_scale: expected 2 arguments"),
    ("crop scale downwards", "--global_crops_scale 1 0.5", "expected two positive fractions, the smaller first"),
    ("crop scale 0", "--local_crops_scale 0 0.4", "expected two positive fractions"),
    ("crop scale nan", "--local_crops_scale nan 0.4", "found 'nan'"),
    (
        "10^9 local crops",
        "--local_crops_number 1000000000",
        r"--local_crops_number: found '1000000000', expected .* in \[0, 1000\]",
    ),
    (
        "a million workers",
        "--num_workers 1000000",
        r"--num_workers: found '1000000', expected a whole number in \[0, 1000\]",
    ),
    ("negative workers", "--num_workers -1", "--num_workers: found '-1'"),
    ("unknown loss", "--loss dino", "--loss: invalid choice: 'dino'"),
    ("convolutional network", "--arch resnet50", r"no architecture resnet50 \(convolutional .*; expected one of"),
    ("unknown transformer", "--arch vit_gigantic", "no architecture vit_gigantic; expected one of vit_micro"),
    ("shared crops of images of all sizes", "--geometry batch --image_size 0", "--image_size 0 needs --geometry image"),
    (
        "batch norm and micro-batches",
        "--use_bn_in_head true --accum_steps 2",
        "--accum_steps needs --use_bn_in_head false",
    ),
    ("boolean perhaps", "--norm_last_layer perhaps", "'perhaps' is not a boolean, expected true or false"),
    ("batch larger than the data set", "--batch_size_per_gpu 1000000000", "images"),
    ("micro-batches larger than the data set", "--accum_steps 1000000", "images"),
    ("stochastic depth of 1", "--drop_path_rate 1", r"expected a number in \[0, 0.99\]"),
    ("precision int8", "--precision int8", "--precision: invalid choice: 'int8'"),
    ("optimizer adam", "--optimizer adam", "--optimizer: invalid choice: 'adam'"),
    ("timeout 0", "--dist_timeout 0", "--dist_timeout: found '0'"),
    ("head wider than memory", "--head_hidden_dim 2000000000", "--head_hidden_dim: found"),
    ("more prototypes than memory", "--out_dim 2000000000", "--out_dim: found"),
    ("images larger than memory", "--image_size 1000000000", "--image_size: found"),
    ("negative clipping", "--clip_grad -1", "--clip_grad: found '-1'"),
    ("distortion of 2", "--distortion 2", r"expected a number in \[0, 1\]"),
    ("more bad images than images", "--max_bad_images 2", r"expected a number in \[0, 1\]"),
    ("ten times the lambda", "--loss lambda --lambda_cls 5", r"expected a number in \[0, 1\]"),
    ("data set without a name", "--dataset imagenet", "--dataset: found 'imagenet', expected one of folder, "),
    ("lines in a value", "--loss {newline}", "invalid choice"),
]
# Commands: name, words, message
COMMANDS = [
    ("k-NN with K = 0", f"{KNN} --nb_knn 0", "--nb_knn: found '0', expected a whole number of at least 1"),
    ("k-NN with more neighbours than images", f"{KNN} --nb_knn 1000000", "--nb_knn 1000000 is more than the"),
    ("k-NN without K", f"{KNN} --nb_knn", "--nb_knn: expected at least one argument"),
    ("k-NN at temperature 1e-300", f"{KNN} --temperature 1e-300", "--temperature: found '1e-300'"),
    ("k-NN at temperature nan", f"{KNN} --temperature nan", "--temperature: found 'nan'"),
    ("k-NN on images of one pixel", f"{KNN} --crop_size 1", "images of side 1 are smaller than a patch of 8 pixels"),
    ("k-NN on images of 10^9 pixels", f"{KNN} --crop_size 1000000000", "--crop_size: found"),
    (
        "k-NN of a missing network",
        f"{KNN} --checkpoint_key momentum",
        "has no 'momentum', found teacher: see --checkpoint_key",
    ),
    ("k-NN of another architecture", f"{KNN} --arch vit_base", "was made with --arch vit_micro, found --arch vit_base"),
    ("k-NN with other patches", f"{KNN} --patch_size 16", "was made with --patch_size 8, found --patch_size 16"),
    ("k-NN with DINO's files of features", f"{KNN} --dump_features f", "extract_features.py writes features"),
    ("k-NN without weights", "eval_knn.py --data_path {data}", "arguments are required: --pretrained_weights"),
    (
        "k-NN with missing weights",
        "eval_knn.py --data_path {data} --pretrained_weights {here}/c.pth",
        "no checkpoint at",
    ),
    (
        "k-NN of weights with a long name",
        f"eval_knn.py --data_path {{data}} --pretrained_weights {LONG}",
        "no checkpoint at|cannot open",
    ),
    ("k-NN with a batch of 0", f"{KNN} --batch_size_per_gpu 0", "--batch_size_per_gpu: found '0'"),
    ("linear with lr nan", f"{LINEAR} --lr nan", "--lr: found 'nan'"),
    ("linear with 10^18 epochs", f"{LINEAR} --epochs {10**18}", "--epochs: found '10{18}'"),
    ("linear with lr 1e300", f"{LINEAR} --lr 1e300", "--lr: found '1e300'"),
    ("linear on more blocks than there are", f"{LINEAR} --n_last_blocks 99", "--n_last_blocks 99|99, expected"),
    ("linear with fewer outputs than classes", f"{LINEAR} --num_labels 1", "--num_labels 1"),
    ("linear without weights to validate", f"{LINEAR} --evaluate", "found no linear weights at"),
    ("linear that validates every 0 epochs", f"{LINEAR} --val_freq 0", "--val_freq: found '0'"),
    ("linear with flips of probability 2", f"{LINEAR} --flip_prob 2", "--flip_prob: found '2'"),
    (
        "copy detection without data",
        "eval_copy_detection.py --data_path {here} --pretrained_weights none",
        "original|strong",
    ),
    (
        "copy detection on negative top results",
        "eval_copy_detection.py --data_path {here} --pretrained_weights none --topk -1",
        "--topk: found '-1'",
    ),
    (
        "retrieval on an unknown data set",
        "eval_image_retrieval.py --data_path {here} --pretrained_weights none --dataset oxford",
        "invalid choice: 'oxford'",
    ),
    (
        "retrieval without data",
        "eval_image_retrieval.py --data_path {here} --pretrained_weights none --arch vit_micro",
        "gnd_roxford5k.pkl",
    ),
    ("features of an unknown kind", f"{FEATURES} --features mean", "--features: invalid choice: 'mean'"),
    (
        "features in a text file",
        f"{FEATURES} --output {{here}}/f.txt",
        r"ends in '.txt', expected .npz or .safetensors",
    ),
    (
        "features below a file",
        f"{FEATURES} --output {{weights}}/f.npz",
        "cannot write to the folder of --output|cannot open",
    ),
    ("features in a folder with a long name", f"{FEATURES} --output {{here}}/{LONG}/f.npz", "File name too long"),
    ("features in a file with a long name", f"{FEATURES} --output {{here}}/{LONG}.npz", "File name too long"),
    (
        "features over a file",
        f"{FEATURES} --output {{run}}/../f.npz --half --output {{here}}/a.npz",
        "already exists",
        text_file("a.npz", "precious"),
    ),
    ("features of long data", f"{FEATURES} --data_path {{here}}/{LONG}", "no folder|File name too long"),
    (
        "export into a file",
        "export.py --pretrained_weights {weights} --output_dir {weights}",
        "cannot write to --output_dir|Not a directory",
    ),
    (
        "export over files",
        "export.py --pretrained_weights {weights} --output_dir {here}",
        "config.json already exists",
        text_file("config.json", ""),
    ),
    ("export without a folder", "export.py --pretrained_weights {weights}", "arguments are required: --output_dir"),
    ("no picture command", "visualize.py", "arguments are required: COMMAND"),
    ("unknown picture command", "visualize.py matchs", "invalid choice: 'matchs'"),
    (
        "picture of an unknown format",
        f"{MATCHES} --output {{here}}/m.docx",
        "found the suffix '.docx', expected .png or .pdf",
    ),
    (
        "picture in a folder's place",
        f"{MATCHES} --output {{here}}/a.png",
        "found a folder, expected a file name",
        folder("a.png"),
    ),
    ("picture with a long name", f"{MATCHES} --output {{here}}/{LONG}.png", "File name too long"),
    ("crop smaller than a patch", f"{MATCHES} --local_crops_size 4", "is not a multiple of --patch_size 16"),
    ("matches of 0 pairs", f"{MATCHES} --pairs 0", "--pairs: found '0'"),
    (
        "attention above 1",
        "visualize.py attention coffee --pretrained_weights {weights} --threshold 2",
        "--threshold: found '2'",
    ),
    (
        "patch outside of the image",
        "visualize.py neighbours coffee china --pretrained_weights {weights} --image_size 64 --patch 9999 0",
        "9999",
    ),
    ("no neighbours", "visualize.py neighbours coffee china --pretrained_weights {weights} --k 0", "--k: found '0'"),
    ("plot of no run", "plot_runs.py", "arguments are required: OUT"),
    (
        "plot of an empty folder",
        "plot_runs.py {here} --output {here}/p.png",
        "no .*log.txt: expected the --output_dir of a run",
    ),
    ("plot of a file", "plot_runs.py {weights} --output {here}/p.png", "no .*log.txt: expected"),
    (
        "plot of a long name",
        f"plot_runs.py {LONG} --output {{here}}/p.png",
        "no .*log.txt: expected|File name too long",
    ),
    ("plot in an unknown format", "plot_runs.py {run} --output {here}/p.svgz", "found the suffix '.svgz'"),
    ("table of another paper", "reproduce.py show table99", "invalid choice: 'table99'"),
    ("no table", "reproduce.py run", "required: TABLE"),
    ("row of another table", "reproduce.py show table6 --row dinov2", "table6 has no row dinov2, expected some of"),
    ("table without data", "reproduce.py run table6 --row mean", "required: --data_root"),
    ("table with missing data", "reproduce.py run table6 --data_root {here} --runs {here}/runs", "expected below"),
    (
        "processes that do not divide the batch",
        "reproduce.py show table6 --nproc_per_node 7",
        "--nproc_per_node 7 does not divide",
    ),
    (
        "list of runs in a file",
        "reproduce.py list --runs {weights}",
        "--runs .*weights.pth is a file, expected the folder",
    ),
    (
        "report of runs in a file",
        "reproduce.py report --runs {weights}",
        "--runs .*weights.pth is a file, expected the folder",
    ),
    ("report into a folder", "reproduce.py report --runs {here} --output {here}", "cannot save .*directory"),
    (
        "report below a file",
        "reproduce.py report --runs {here} --output {weights}/r.md",
        "cannot write to the folder of --output|cannot open",
    ),
    ("report with a long name", f"reproduce.py report --runs {{here}} --output {{here}}/{LONG}", "File name too long"),
    ("lists of no images", "reproduce.py lists {here} --output_dir {here}", "no images|class folders|lacks"),
    ("job without nodes", "run_with_submitit.py --nodes 0", "--nodes: found '0'"),
    (
        "job with processes for other GPUs",
        "run_with_submitit.py --gpus_per_node 2 --tasks_per_node 3",
        "--tasks_per_node 3: expected one for each of the 2 GPUs",
    ),
    (
        "job on an unknown cluster",
        "run_with_submitit.py --cluster kubernetes",
        "--cluster: invalid choice: 'kubernetes'",
    ),
    (
        "job with a wrong training option",
        "run_with_submitit.py --gpus_per_node 0 --output_dir {here} --lr nan",
        "--lr: found 'nan'",
    ),
    (
        "job with an unknown option",
        "run_with_submitit.py --gpus_per_node 0 --output_dir {here} --node 2",
        "unknown option --node",
    ),
    ("job that writes below a file", "run_with_submitit.py --output_dir {weights}/out", "cannot write to --output_dir"),
    ("job with a missing argument file", "run_with_submitit.py @absent.args", "cannot read argument file absent.args"),
]
# Argument files: name, message, function that makes {here}/a.args
ARGUMENT_FILES = [
    ("missing argument file", "cannot read argument file .*a.args: No such file", None),
    ("folder as argument file", "cannot read argument file .*a.args: it is a folder", folder("a.args")),
    ("pipe as argument file", "it is no regular file", lambda here, places: os.mkfifo(here / "a.args")),
    (
        "argument file that links to itself",
        "symbolic links",
        lambda here, places: (here / "a.args").symlink_to("a.args"),
    ),
    ("argument file that includes itself", "includes itself", arguments("--epochs 1 @a.args")),
    ("argument file with an open quotation mark", "No closing quotation", arguments("--dataset 'digits")),
    (
        "argument file that is no text",
        "cannot read argument file .*codec can't decode",
        arguments(b"--epochs \xff\xfe1"),
    ),
    ("argument file in UTF-16", "cannot read argument file", arguments("--epochs 1".encode("utf-16"))),
    ("argument file with a NUL", "it contains a NUL character", arguments(b"--output_dir a\0b")),
    ("argument file that includes a NUL", "it contains a NUL character", arguments(b"@b\0c")),
    ("argument file that includes a long name", "File name too long", arguments(f"@{LONG}")),
    (
        "argument file with an unknown option",
        r"unknown option --lrr in .*a.args; did you mean --lr\?",
        arguments("--lrr 1"),
    ),
    ("argument file of 2 MB", "it has 2000000 bytes, expected at most 1048576", arguments("#" * 2_000_000)),
    ("argument file of a device", "it is no regular file", arguments("@/dev/zero")),
    ("argument file with a wrong value", "--lr: found 'fast'", arguments("--lr fast")),
]
# Environments of a launcher: name, message, variables
ENVIRONMENTS = [
    ("rank without world size", "RANK=1 and WORLD_SIZE=1, RANK must be less", {"RANK": "1"}),
    ("rank above world size", "RANK=4 and WORLD_SIZE=2", {"RANK": "4", "WORLD_SIZE": "2"}),
    ("world size without rank", "WORLD_SIZE=2, but no RANK", {"WORLD_SIZE": "2"}),
    ("negative world size", "WORLD_SIZE='-1', no number", {"WORLD_SIZE": "-1"}),
    ("world size 0", "RANK=0 and WORLD_SIZE=0", {"WORLD_SIZE": "0", "RANK": "0"}),
    ("empty world size", "WORLD_SIZE='', no number", {"WORLD_SIZE": ""}),
    ("world size in words", "WORLD_SIZE='abc', no number", {"WORLD_SIZE": "abc", "RANK": "0"}),
    ("local rank in words", "LOCAL_RANK='x', no number", {"LOCAL_RANK": "x"}),
    ("negative local rank", "LOCAL_RANK='-1', no number", {"LOCAL_RANK": "-1", "RANK": "0", "WORLD_SIZE": "1"}),
    ("no address", "MASTER_ADDR=None and MASTER_PORT=None", {"RANK": "0", "WORLD_SIZE": "2"}),
    ("no port", "MASTER_PORT=None, expected", {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}),
    (
        "port in words",
        "MASTER_PORT=http, expected",
        {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
    ),
    (
        "port of 70000",
        "MASTER_PORT=70000, expected",
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "70000"},
    ),
    (
        "store of torchrun without address",
        "MASTER_ADDR=None",
        {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_USE_AGENT_STORE": "True"},
    ),
]
C_LOCALE = {"OMP_NUM_THREADS": "abc", "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
ASCII = {"PYTHONIOENCODING": "ascii", "CUDA_VISIBLE_DEVICES": "all of them"}
NO_LAUNCHER = dict.fromkeys("RANK WORLD_SIZE LOCAL_RANK MASTER_ADDR MASTER_PORT TORCHELASTIC_USE_AGENT_STORE".split())
SALLOC = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NODELIST": "node[1-4]"}
# Logs of a run that plot_runs.py reads: name, message, code, changes of the run
LOGS = [
    ("plot of a run without a log", "no .*log.txt: expected", 2, [lambda run: (run / "log.txt").unlink()]),
    ("plot of an empty log", "has no finished epoch yet: omit this folder", 2, [log()]),
    ("plot of a log of bytes", "has no finished epoch yet", 2, [log(b"\xff\x00\xfe" * 99)]),
    ("plot of a log of NaN", "has no finite number of loss", 2, [log({"epoch": 0, "train_loss": float("nan")})]),
    ("plot of a log with other keys", "has no finite number of loss", 2, [log({"epoch": 0, "test_acc": 3.0})]),
    ("plot of a log of other JSON", "has no finished epoch yet", 2, [log([1], None, 3, "epoch", [["epoch", 1]])]),
    (
        "plot of a log with epochs of other types",
        "has no finished epoch yet",
        2,
        [log({"epoch": "3", "train_loss": 1}, {"epoch": None}, {"epoch": [1]}, {"epoch": 1.5})],
    ),
    (
        "plot of a log with losses of other types",
        "has no finite number",
        2,
        [log({"epoch": 0, "train_loss": "NaN"}, {"epoch": 1, "train_loss": {"a": 1}})],
    ),
    ("plot of a deeply nested log", "has no finished epoch yet", 2, [log(b"[" * 100_000)]),
    (
        "plot of a log with huge integers",
        "has no finished epoch yet",
        2,
        [log({"epoch": 10**400, "train_loss": 10**400})],
    ),
    ("plot of one epoch", "drawn in", 0, [log({"epoch": 0, "train_loss": 1.0})]),
    (
        "plot of a log with bytes between epochs",
        "drawn in",
        0,
        [log({"epoch": 0, "train_loss": 1.0}, b"\xff\xfe", {"epoch": 1, "train_loss": 2.0})],
    ),
    ("plot of a run in the far future", "drawn in", 0, [log({"epoch": 2**62, "train_loss": 1e30})]),
    ("plot of a folder in place of a log", "cannot read .*log.txt: it is a folder", 2, [replaced_by_folder("log.txt")]),
    (
        "plot of a folder in place of arguments",
        "cannot read .*args.json: remove it",
        2,
        [replaced_by_folder("args.json")],
    ),
    (
        "plot of a folder in place of an environment",
        "cannot read .*environment.jsonl: it is a folder",
        2,
        [replaced_by_folder("environment.jsonl")],
    ),
    (
        "plot of arguments of other types",
        "drawn in",
        0,
        [run_arguments(seed=[1], loss={"a": None}, epochs="many", dataset=None)],
    ),
    (
        "plot of arguments in a list",
        "cannot read .*args.json: remove it",
        2,
        [lambda run: (run / "args.json").write_text("[1, 2]")],
    ),
    (
        "plot of arguments that are no text",
        "cannot read .*args.json: remove it",
        2,
        [lambda run: (run / "args.json").write_bytes(b"\xff")],
    ),
    (
        "plot of an environment of other types",
        "drawn in",
        0,
        [log({"processes": "two"}, [], {"processes": None}, name="environment.jsonl")],
    ),
]
# Runs and results that reproduce.py reads: name, words, what the output shows, function that makes them
RESULTS = [
    (
        "report of a broken result",
        "report",
        NOT_RUN,
        text_file("runs/cifar10_vit_tiny16_mean/knn_cifar10.json", b"\xff{"),
    ),
    ("report of a result in a list", "report", NOT_RUN, result([1, 2])),
    (
        "report of a result with a text",
        "report",
        NOT_RUN,
        result({"args": {}, "images": {}, "pretraining": {}, "knn": {"10": {"top1": "high"}}}),
    ),
    (
        "report of a result of NaN",
        "report",
        NOT_RUN,
        result({"args": {}, "images": {}, "pretraining": {}, "knn": {"10": {"top1": float("nan")}}}),
    ),
    (
        "report of a result with other parts",
        "report",
        NOT_RUN,
        result({"args": 3, "images": [], "pretraining": "none", "knn": 7}),
    ),
    (
        "report of a folder in place of a result",
        "report",
        NOT_RUN,
        folder("runs/cifar10_vit_tiny16_mean/knn_cifar10.json"),
    ),
    ("list of a log of other types", "list", NOT_BEGUN, copied_run(log({"epoch": "3"}, []), to=RECIPE)),
    ("list of a run of many epochs", "list", NOT_BEGUN, copied_run(run_arguments(epochs="many"), to=RECIPE)),
    ("list of a run of no epochs", "list", NOT_BEGUN, copied_run(run_arguments(epochs=0), to=RECIPE)),
    ("list of no runs", "list", NOT_BEGUN, None),
]
# Places to write to: name, words, message, function
OUTPUTS = [
    (
        "training into a file",
        f"{TRAIN} --output_dir {{here}}/file",
        "cannot write to --output_dir|cannot open",
        text_file("file", ""),
    ),
    (
        "training below a file",
        f"{TRAIN} --output_dir {{weights}}/out",
        "cannot write to --output_dir|cannot open",
        None,
    ),
    ("training into a long name", f"{TRAIN} --output_dir {{here}}/{LONG}", "File name too long", None),
    ("training into a device", f"{TRAIN} --output_dir /dev/null/out", "cannot write to --output_dir|cannot open", None),
    ("training on data with a long name", f"{TRAIN} --data_path {LONG}", "no folder|File name too long", None),
    ("training beside another's log", TRAIN, "holds logs but no run", text_file("out/log.txt", "my notes")),
    ("training with a folder in place of the arguments", TRAIN, "args.json", folder("out/args.json")),
    ("training with a folder in place of the checkpoint", TRAIN, "checkpoint", folder("out/checkpoint.pth")),
    ("training with a pipe in place of a log", TRAIN, "environment.jsonl is not a file", pipe),
    ("k-NN into a file", f"{KNN} --output_dir {{here}}/file", "cannot write to --output_dir", text_file("file", "")),
    ("k-NN over a folder", KNN, "cannot save .*knn_folder.json", folder("out/knn_folder.json")),
    ("linear over a folder", LINEAR, "linear_folder", folder("out/linear_folder.pth")),
]
CASES = [
    *(Case(name, f"{TRAIN} {words}".replace("{newline}", "a\vb"), expected) for name, words, expected in OPTIONS),
    *(Case(name, words, expected, *make) for name, words, expected, *make in COMMANDS),
    *(Case(name, f"{TRAIN} @{{here}}/a.args", expected, make) for name, expected, make in ARGUMENT_FILES),
    Case(
        "argument files that include each other 2^25 times",
        f"{TRAIN} @{{here}}/0.args",
        "at most 100 files",
        included_twice,
    ),
    Case("endless device as argument file", f"{TRAIN} @/dev/zero", "it is no regular file"),
    Case("argument file with a long name", f"{TRAIN} @{LONG}", "cannot read argument file n+: File name too long"),
    Case("argument file without a name", f"{TRAIN} @", "cannot read argument file .*: it is a folder"),
    Case(
        "argument file with a byte order mark",
        f"{TRAIN} @{{here}}/a.args",
        "done:",
        arguments(b"\xef\xbb\xbf--log_every 3"),
        code=0,
    ),
    Case("empty argument file", f"{TRAIN} @{{here}}/a.args", "done:", arguments(""), code=0),
    Case(
        "argument file of an evaluation",
        f"{KNN} @{{here}}/a.args",
        r"k-NN \(K=2\)",
        arguments("--nb_knn 2 # comment"),
        code=0,
    ),
    Case("argument file of a job", "run_with_submitit.py @{here}/a.args", "--nodes: found '0'", arguments("--nodes 0")),
    *(Case(name, TRAIN, expected, env={**NO_LAUNCHER, **env}) for name, expected, env in ENVIRONMENTS),
    Case("rank without world size in an evaluation", KNN, "RANK=1 and WORLD_SIZE=1", env={**NO_LAUNCHER, "RANK": "1"}),
    Case("rank 0 alone", TRAIN, "done:", code=0, env={**NO_LAUNCHER, "RANK": "0"}),
    Case("shell of salloc", TRAIN, "done:", code=0, env={**NO_LAUNCHER, **SALLOC}),
    Case("batch script of SLURM", TRAIN, "done:", code=0, env={**NO_LAUNCHER, **SALLOC, "SLURM_PROCID": "0"}),
    Case(
        "task of srun",
        TRAIN,
        "srun starts 4 tasks, each a run",
        code=0,
        env={**NO_LAUNCHER, **SALLOC, "SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"},
    ),
    Case(
        "argument file that includes itself through a link",
        f"{TRAIN} @{{here}}/b.args",
        "includes itself",
        linked_to_itself,
    ),
    Case(
        "number of threads in words, in the C locale", "reproduce.py list", "table1", code=0, process=True, env=C_LOCALE
    ),
    Case(
        "help on an ASCII terminal", "main_lgssl.py --help", "weight of the CLS token", code=0, process=True, env=ASCII
    ),
    Case(
        "GPUs in words, on an ASCII terminal",
        FEATURES,
        "written to",
        code=0,
        process=True,
        env={**NO_LAUNCHER, **ASCII},
    ),
    Case("map with perplexity 10^6", MAP, "drawn in", code=0),
    *(Case(name, PLOT, expected, copied_run(*changes), code) for name, expected, code, changes in LOGS),
    Case(
        "plot of a run and its copy",
        "plot_runs.py {run} {here}/run --output {here}/p.png",
        "are runs of one setting and seed",
        copied_run(),
    ),
    *(Case(name, f"reproduce.py {words} --runs {{here}}/runs", shown, make, 0) for name, words, shown, make in RESULTS),
    *(Case(name, words, expected, make) for name, words, expected, make in OUTPUTS),
    Case(
        "TensorBoard in a file",
        TRAIN,
        "tb is not a folder: move it",
        tensorboard_is_a_file,
    ),
    Case("warm-up longer than the run", f"{TRAIN} --warmup_epochs 1000000", "done:", code=0),
    Case(
        "no distortion, no flips, no local crops",
        f"{TRAIN} --distortion 0 --flip_prob 0 --local_crops_number 0",
        "done:",
        code=0,
    ),
    Case("learning rate 0", f"{TRAIN} --lr 0 --min_lr 0", "done:", code=0),
]
