import json

import numpy as np
import pytest

import plot_runs
from support import figures
from utils import UserError, one_line_errors


@pytest.fixture
def write_run(tmp_path):
    """Write a log of random numbers like main_lgssl.py does, and return (folder, losses [epochs])."""

    def write(name, epochs=3, knn_every=0, arguments=None, **changes):
        folder = tmp_path / name
        folder.mkdir()
        losses = np.random.default_rng(len(list(tmp_path.iterdir()))).uniform(3, 5, epochs)
        lines = []
        for epoch, loss in enumerate(losses.tolist()):
            entry = {"train_loss": loss, "train_entropy_share": loss / 10, "train_matched_patches": 2 * loss}
            if knn_every and (epoch + 1) % knn_every == 0:
                entry["knn_top1"] = 10.0 * loss
            lines.append(json.dumps({**entry, "epoch": epoch}))
        (folder / "log.txt").write_text("\n".join(lines) + "\n")
        if arguments is None:
            defaults = {"loss": "mean", "lambda_cls": 0.5, "matching": "paper", "geometry": "batch", "seed": 0}
            arguments = {**defaults, "num_workers": len(name), "output_dir": str(folder), **changes}
        if arguments:
            (folder / "args.json").write_text(json.dumps(arguments))
        return folder, losses

    return write


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Run the command without writing files, and return {title of a panel: axes} and the texts of the legend."""

    def run(*folders):
        written = []
        monkeypatch.setattr(figures, "save", lambda pages, path: written.extend(pages))
        plot_runs.main([*map(str, folders), "--output", str(tmp_path / "runs.png")])
        legend = [text.get_text() for text in written[0].legends[0].get_texts()]
        return {axis.get_title(): axis for axis in written[0].axes}, legend

    return run


def band(collection, x):
    """Return the lower and the upper edge of a band at given x."""
    vertices = collection.get_paths()[0].vertices
    edges = [[y for vx, y in vertices if np.isclose(vx, at)] for at in x]
    return np.array([min(ys) for ys in edges]), np.array([max(ys) for ys in edges])


def test_curves_are_means_over_seeds_with_a_band_of_one_deviation(write_run, drawn, capsys):
    ours = [write_run(f"mean-{seed}", seed=seed) for seed in range(3)]
    dino = [write_run(f"dino-{seed}", loss="cls", seed=seed) for seed in range(2)]
    axes, legend = drawn(*(folder for folder, _ in ours + dino))
    assert legend == ["loss mean (3 seeds)", "loss cls (2 seeds)"]
    assert list(axes) == ["Loss", "Entropy of the teacher’s outputs", "Matched patches"]
    for title, factor in (("Loss", 1), ("Entropy of the teacher’s outputs", 0.1), ("Matched patches", 2)):
        for i, runs in enumerate((ours, dino)):
            values = factor * np.stack([losses for _, losses in runs])
            line = axes[title].lines[i]
            x, deviation = np.arange(1, 4), values.std(0, ddof=1)
            np.testing.assert_allclose(line.get_xdata(), x)
            np.testing.assert_allclose(line.get_ydata(), values.mean(0))
            low, high = band(axes[title].collections[i], x)
            np.testing.assert_allclose(low, values.mean(0) - deviation)
            np.testing.assert_allclose(high, values.mean(0) + deviation)
    last = np.array([losses[-1] for _, losses in ours])
    table = capsys.readouterr().out.splitlines()
    assert table[0].split("  ")[0] == "setting"
    start = ["loss", "mean", "3", "3", f"{last.mean():.3f}", "±", f"{last.std(ddof=1):.3f}"]
    assert table[1].split() == [*start, f"{last.mean() / 10:.3f}", "±", f"{last.std(ddof=1) / 10:.3f}"] + [
        f"{2 * last.mean():.1f}",
        "±",
        f"{2 * last.std(ddof=1):.1f}",
    ]
    assert table[-1].startswith("drawn in ")


def test_knn_is_drawn_where_it_was_measured(write_run, drawn, capsys):
    runs = [write_run(f"r{seed}", epochs=5, knn_every=2, seed=seed) for seed in range(2)]
    axes, _ = drawn(*(folder for folder, _ in runs))
    values = 10 * np.stack([losses[[1, 3]] for _, losses in runs])
    line = axes["Online k-NN"].lines[0]
    np.testing.assert_allclose(line.get_xdata(), [2, 4])
    np.testing.assert_allclose(line.get_ydata(), values.mean(0))
    assert f"{values[:, 1].mean():.1f} ± {values[:, 1].std(ddof=1):.1f}" in capsys.readouterr().out


def test_short_runs_count_up_to_their_last_epoch(write_run, drawn, capsys):
    runs = [write_run(f"r{seed}", epochs=seed + 1, seed=seed) for seed in range(3)]
    axes, legend = drawn(*(folder for folder, _ in runs))
    assert legend == ["loss mean (3 seeds)"]
    values = np.full((3, 3), np.nan)
    for row, (_, losses) in zip(values, runs, strict=True):
        row[: len(losses)] = losses
    line = axes["Loss"].lines[0]
    np.testing.assert_allclose(line.get_ydata(), np.nanmean(values, 0))
    low, _ = band(axes["Loss"].collections[0], [1, 2])
    np.testing.assert_allclose(low, np.nanmean(values[:, :2], 0) - np.nanstd(values[:, :2], 0, ddof=1))
    assert axes["Loss"].collections[0].get_paths()[0].vertices[:, 0].max() == 2  # a single seed has no band
    assert " 1 to 3 " in capsys.readouterr().out


def test_truncated_lines_are_skipped(write_run):
    folder, losses = write_run("r", epochs=6)
    path = folder / "log.txt"
    lines = path.read_text().splitlines()
    damaged = [lines[0][:20], lines[1], '["no entry"]', '{"epoch": 2, "train_loss": NaN}', lines[3][:-1], *lines[4:]]
    path.write_text("\n".join(damaged) + '\n{"train_loss": 4.1, "epo')
    assert plot_runs.read_run(folder).curves["loss"] == {2: losses[1], 5: losses[4], 6: losses[5]}


def test_a_log_without_arguments_is_named_by_its_folder(write_run, drawn):
    folder, losses = write_run("theirs", arguments={})
    log = [json.dumps({"train_loss": loss, "epoch": epoch}) for epoch, loss in enumerate(losses)]  # as DINO writes it
    (folder / "log.txt").write_text("\n".join(log) + "\n")
    axes, legend = drawn(folder)
    assert (list(axes), "".join(legend[0].split())) == (["Loss"], f"{folder}(1seed)")
    assert len(axes["Loss"].collections[0].get_paths()) == 0  # a single seed has no band


def test_labels_name_the_arguments_that_differ(write_run):
    def labels(*folders):
        return {k: len(runs) for k, runs in plot_runs.settings([plot_runs.read_run(f) for f, _ in folders]).items()}

    mean = [write_run(f"mean-{seed}", seed=seed, log_every=seed + 1) for seed in range(2)]
    lambdas = [write_run(f"lambda-{value}", loss="lambda", lambda_cls=value) for value in (0.2, 0.9)]
    assert labels(*mean) == {"loss mean": 2}
    assert labels(*lambdas) == {"lambda_cls 0.2": 1, "lambda_cls 0.9": 1}
    assert labels(*mean, lambdas[0]) == {"loss mean, lambda_cls 0.5": 2, "loss lambda, lambda_cls 0.2": 1}
    scales = write_run("scales", global_crops_scale=[0.25, 1.0])
    assert labels(mean[0], scales) == {"global_crops_scale [0.4, 1.0]": 1, "global_crops_scale [0.25, 1.0]": 1}
    moved = write_run("moved", seed=1, data_path="other", gone="an option of another version")
    assert labels(mean[0], moved) == {"data_path None": 1, "data_path other": 1}
    newer = [write_run(place, seed=1, distort_on=place) for place in ("workers", "device")]
    assert labels(mean[0], newer[0]) == {"loss mean": 2}  # runs from before this option distorted there
    assert labels(mean[0], newer[1]) == {"distort_on workers": 1, "distort_on device": 1}
    bare = write_run("bare", arguments={})
    assert labels(mean[0], bare) == {"loss mean": 1, str(bare[0]): 1}
    with pytest.raises(UserError, match="mean-0 and .*again are runs of one setting and seed"):
        labels(*mean, write_run("again"))


def test_older_runs_on_imagenet100_have_the_list_cmc(write_run):
    lists = {"old": None, "cmc": "cmc", "kaggle": "kaggle"}
    runs = [write_run(name, dataset="imagenet100", classes=lists[name], seed=i)[0] for i, name in enumerate(lists)]
    groups = plot_runs.settings([plot_runs.read_run(run) for run in runs])
    assert {label: len(group) for label, group in groups.items()} == {"classes cmc": 2, "classes kaggle": 1}


def test_names_stand_in_the_figure_and_the_table(write_run, drawn, capsys):
    """In the order of the settings' first runs."""
    runs = [write_run(f"r{i}", loss=loss, seed=i)[0] for i, loss in enumerate(("cls", "mean", "cls", "sum"))]
    _, legend = drawn(*runs, "--names", "DINO", "Ours, mean", "$_sum$")
    assert legend == ["DINO (2 seeds)", "Ours, mean (1 seed)", "$_sum$ (1 seed)"]
    table = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in table[:4]] == ["setting", "DINO", "Ours, mean", "$_sum$"]
    for names in (["DINO", "Ours"], ["a", "b", "c", "d"], ["a", "b", "a"]):
        message = f"--names {' '.join(names)}: found {len(names)}, expected 3 different names, one for each of these "
        with pytest.raises(
            UserError, match=message + "settings, in this order: 1: loss cls; 2: loss mean; 3: loss sum"
        ):
            drawn(*runs, "--names", *names)


def test_long_labels_are_whole_and_the_table_is_narrow(write_run, drawn, capsys):
    options = {"teacher_temp": 0.03, "warmup_teacher_temp": 0.03, "data_path": f"/data/{'folder-with/' * 30}end"}
    options |= {"global_crops_size": 64, "momentum_teacher": 0.98, "global_crops_scale": [0.25, 1.0], "lr": 0.1}
    runs = [write_run("plain")[0], write_run("other", **options)[0], write_run("seed", seed=1, **options)[0]]
    _, legend = drawn(*runs)
    printed = capsys.readouterr().out.splitlines()[:-1]
    assert max(map(len, printed)) <= 100
    assert [line.split()[:2] for line in printed[:3]] == [["setting", "seeds"], ["1", "1"], ["2", "2"]]
    long = next(iter(list(plot_runs.settings([plot_runs.read_run(run) for run in runs]))[1:]))
    assert len(long) > 450
    assert "".join(legend[1].split()) == "".join(f"{long} (2 seeds)".split())
    assert "".join("".join(printed[3:]).split()).endswith("".join(f"2: {long}".split()))


def test_losses_of_different_out_dim_have_panels_of_their_own(write_run, drawn):
    ours, dino, again = (write_run(f"{dim}{i}", out_dim=dim, seed=i) for i, dim in enumerate((64, 256, 64)))
    axes, legend = drawn(ours[0], dino[0], again[0])
    assert list(axes)[:3] == ["Loss, K = 64", "Loss, K = 256", "Entropy of the teacher’s outputs"]
    assert legend == ["out_dim 64 (2 seeds)", "out_dim 256 (1 seed)"]
    shown = [[line.get_ydata().tolist() for line in axes[f"Loss, K = {dim}"].lines] for dim in (64, 256)]
    np.testing.assert_allclose(shown[0][0], (ours[1] + again[1]) / 2)
    assert [shown[0][1], *shown[1]] == [[], [], dino[1].tolist()]


def test_what_does_not_change_is_not_drawn(write_run, drawn, capsys):
    """Such as matched patches, which differ only by chance. A single epoch is drawn, and so is a run that is flat."""
    folders = []
    for name, level in (("a", 0.0), ("b", 50.0)):
        folders.append(write_run(name, loss=name, epochs=4)[0])
        entries = [json.loads(line) for line in (folders[-1] / "log.txt").read_text().splitlines()]
        for epoch, entry in enumerate(entries):
            entry["train_matched_patches"] = level * (1 + 0.002 * (epoch % 2))
        (folders[-1] / "log.txt").write_text("\n".join(map(json.dumps, entries)))
    axes, _ = drawn(*folders)
    assert list(axes) == ["Loss", "Entropy of the teacher’s outputs"]
    assert "not drawn, since no curve changes by more than 1%: matched_patches\n" in capsys.readouterr().out
    once = write_run("once", epochs=1)[0]
    assert list(drawn(once)[0]) == ["Loss", "Entropy of the teacher’s outputs", "Matched patches"]
    (once / "log.txt").write_text("".join(f'{{"epoch": {epoch}, "train_loss": 2}}\n' for epoch in range(3)))
    assert list(drawn(once)[0]) == ["Loss"]


def test_curves_of_studies_are_drawn_per_row(tmp_path, drawn):
    lines = ["row,seed,epoch,loss,knn_top1,entropy_share,matched_patches", "dino,0,1,5,,,", "dino,0,2,4,50,,0"]
    path = tmp_path / "curves.csv"
    path.write_text("\n".join([*lines, lines[0], "dino,1,2,2,60,,0", "mean --lr 1,0,1,3,,,7", ""]))
    axes, legend = drawn(path)
    assert legend == ["dino (2 seeds)", "mean --lr 1 (1 seed)"]
    np.testing.assert_allclose(axes["Loss"].lines[0].get_xydata(), [[1, 5], [2, 3]])
    np.testing.assert_allclose(axes["Online k-NN"].lines[0].get_xydata(), [[2, 55]])
    np.testing.assert_allclose(axes["Matched patches"].lines[1].get_xydata(), [[1, 7]])
    # Newer lines, here of another process, say the number of prototypes.
    lines += [f"{lines[0]},out_dim", "mean,0,1,3,,,7,64"]
    path.write_text("\n".join([*lines, ""]))
    assert list(drawn(path)[0])[:2] == ["Loss, K = unknown", "Loss, K = 64"]
    # Still newer ones have the online segmentation.
    path.write_text("\n".join([*lines, f"{lines[2]},dense_miou", "sum,0,2,3,,,7,64,31.5", ""]))
    axes, _ = drawn(path)
    np.testing.assert_allclose(axes["Online segmentation"].lines[2].get_xydata(), [[2, 31.5]])
    assert [len(line.get_xdata()) for line in axes["Online segmentation"].lines] == [0, 0, 1]


def test_the_figure_is_written(write_run, tmp_path, capsys):
    path = tmp_path / "runs.pdf"
    plot_runs.main([str(write_run("r")[0]), "--output", str(path)])
    assert path.read_bytes().startswith(b"%PDF")
    assert capsys.readouterr().out.endswith(f"drawn in {path}\n")


def test_bad_input_is_refused_in_one_line(write_run, tmp_path, capsys):
    good = str(write_run("good")[0])
    empty, fresh, broken = tmp_path / "empty", write_run("fresh")[0], write_run("broken")[0]
    empty.mkdir()
    (fresh / "log.txt").write_text("")
    (broken / "args.json").write_text("{")
    header = "row,seed,epoch,loss,knn_top1,entropy_share,matched_patches\n"
    tables = {"short": header + "dino,0\n", "other": "row,loss\n", "none": header}
    for name, text in tables.items():
        (tmp_path / f"{name}.csv").write_text(text)
    for words, message in [
        ([tmp_path / "absent"], "no .*absent/log.txt: expected"),
        ([empty], "no .*empty/log.txt: expected the --output_dir of a run"),
        ([fresh], "fresh/log.txt has no finished epoch yet"),
        ([broken], "cannot read .*args.json"),
        ([good, "--output", tmp_path / "runs.xyz"], "cannot write .*'.xyz', expected .png or .pdf"),
        ([good, "--output", f"{good}/log.txt/runs.png"], "cannot write to the folder of --output .*: File exists"),
        ([good, "--output", empty], "expected .png or .pdf"),
        ([tmp_path / "short.csv"], "short.csv: expected a CSV file with the columns row,seed,epoch,loss,"),
        ([tmp_path / "other.csv"], "other.csv: expected a CSV file with the columns row,seed,epoch,loss,"),
        ([tmp_path / "none.csv"], "none.csv has no runs"),
    ]:
        with pytest.raises(UserError, match=message):
            plot_runs.main(list(map(str, words)))
    with pytest.raises(SystemExit) as ended, one_line_errors():
        plot_runs.main([str(empty)])
    assert (ended.value.code, capsys.readouterr().err.count("\n")) == (2, 1)


def test_runs_on_other_numbers_of_processes_are_other_settings(write_run, capsys):
    folders = [write_run(name, seed=seed)[0] for name, seed in (("one", 0), ("again", 1), ("two", 2))]
    for folder, processes in zip(folders, (1, 1, 2), strict=True):
        (folder / "environment.jsonl").write_text(json.dumps({"processes": processes}) + "\n")
    runs = [plot_runs.read_run(folder) for folder in folders]
    assert {label: len(members) for label, members in plot_runs.settings(runs).items()} == {
        "processes 1": 2,
        "processes 2": 1,
    }
