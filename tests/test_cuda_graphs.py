"""The training with an imitation of CUDA graphs on the CPU against that without. tests/test_gpu.py has true graphs."""

import numpy as np
import pytest
import torch
from digits_run import torchrun
from test_main_lgssl import TINY, assert_same_state, train

import main_lgssl
from augment import MultiCrop, distort_batch
from support import cuda_graphs
from support.loader import ViewBatches, batches_on_device


class Replayed(torch.autograd.Function):
    """A function with the buffers of a CUDA graph. Each call overwrites inputs, outputs and gradients of the last."""

    @staticmethod
    def forward(ctx, graph, *inputs):
        ctx.graph = graph
        for own, given in zip(graph.inputs, inputs, strict=True):
            if own.data_ptr() != given.data_ptr():
                own.data.copy_(given)
        with torch.enable_grad():
            graph.results = graph.function(*graph.inputs)
        for own, result in zip(graph.outputs, graph.results, strict=True):
            own.copy_(result)
        return tuple(output.detach() for output in graph.outputs)

    @staticmethod
    def backward(ctx, *gradients):
        graph = ctx.graph
        trained = [x for x in graph.inputs if x.requires_grad]
        results = torch.autograd.grad(graph.results, trained, gradients)
        for own, result in zip(graph.gradients, results, strict=True):
            own.copy_(result)
        found = iter(graph.gradients)
        return None, *(next(found).detach() if x.requires_grad else None for x in graph.inputs)


class Graph:
    def __init__(self, function, inputs):
        self.function, self.inputs = function, inputs
        self.outputs = [x.detach().clone() for x in function(*inputs)]
        self.gradients = [torch.empty_like(x) for x in inputs if x.requires_grad]

    def __call__(self, *inputs):
        return Replayed.apply(self, *inputs)


def imitate(patch) -> list:
    """Let trainings on the CPU use the imitation, with a function that works as setattr. Return the list of graphs."""
    graphs = []

    def make_graphed_callables(functions, samples, allow_unused_input):
        assert not torch.is_autocast_enabled("cpu")  # of which PyTorch would complain
        made = tuple(map(Graph, functions, samples))
        graphs.extend(made)
        return made

    def accelerate(teacher, student, shapes, dtype, *, compiles, graphs, accumulates, distorts, patch_side):
        if graphs:
            cuda_graphs.capture(teacher, student, shapes, dtype, accumulates)
        return distort_batch, "CUDA graphs" * graphs

    patch(torch.cuda, "make_graphed_callables", make_graphed_callables)
    patch(torch.cuda, "current_stream", lambda: None)
    patch(torch.cuda, "set_sync_debug_mode", lambda _: None)
    patch(main_lgssl, "accelerate", accelerate)
    return graphs


@pytest.mark.parametrize(
    "options",
    [
        "--accum_steps 1",
        "--accum_steps 2",
        "--accum_steps 2 --local_crops_number 0",
        "--accum_steps 2 --drop_path_rate 0 --loss cls",
        "--precision bf16 --accum_steps 2",
        "--accum_steps 2 --patch_head separate",
    ],
)
def test_graphs_change_no_bit(photo_folder, tmp_path, monkeypatch, options):
    """Six steps without graphs, and with graphs in two runs, of which the second resumes."""
    words = [*options.split(), "--batch_size_per_gpu", 2, "--epochs", 2, "--freeze_last_layer", 0, "--knn_every", 1]
    words += ["--save_every_steps", 1]
    expected = train(photo_folder, tmp_path / "plain", *words)
    graphs = imitate(monkeypatch.setattr)
    with monkeypatch.context() as patch:
        patch.setattr(main_lgssl, "end_epoch", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(photo_folder, tmp_path / "graphs", *words)
    resumes_without = "--accum_steps 1" in options
    words += ["--cuda_graphs", str(not resumes_without)]
    assert_same_state(train(photo_folder, tmp_path / "graphs", *words), expected)
    assert len(graphs) == (2 if resumes_without else 4)  # teacher and student in each run


def test_the_imitation_overwrites_gradients(photo_folder, tmp_path, monkeypatch):
    """Without the copies that `capture` makes, the second micro-batch is counted twice."""
    imitate(monkeypatch.setattr)
    words = ["--accum_steps", 2, "--batch_size_per_gpu", 2, "--epochs", 1, "--freeze_last_layer", 0, "--lr", 0.1]
    expected = train(photo_folder, tmp_path / "copied", *words)["student"]
    monkeypatch.setattr(torch.Tensor, "register_hook", lambda *_: None)
    found = train(photo_folder, tmp_path / "overwritten", *words)["student"]
    assert not torch.equal(found["backbone.pos_embed"], expected["backbone.pos_embed"])


@pytest.mark.slow
def test_graphs_change_no_bit_with_two_processes(photo_folder, tmp_path, run_script):
    words = [*TINY, "--data_path", photo_folder, *"--epochs 2 --accum_steps 2 --batch_size_per_gpu 1".split()]
    (tmp_path / "graphs.py").write_text(
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "import main_lgssl, test_cuda_graphs\n"
        "test_cuda_graphs.imitate(setattr)\n"
        "main_lgssl.main(sys.argv[1:])\n"
    )
    states = []
    for name, script in (("plain", "main_lgssl.py"), ("graphs", tmp_path / "graphs.py")):
        output = run_script(script, *words, "--output_dir", tmp_path / name, launcher=torchrun()[1:]).stdout
        assert ("CUDA graphs" in output) == (name == "graphs")
        states.append(torch.load(tmp_path / name / "checkpoint.pth", weights_only=True))
    assert_same_state(*states)


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.11", reason="PyTorch 2.6 compiles it for a CPU to code that crashes")
@pytest.mark.parametrize("patch_side", [0, 8])
def test_the_compiled_distortion_is_the_plain_one(patch_side):
    """Up to values at the boundary of two levels. There is one program for each size of the views of all batches."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    rng = np.random.default_rng(0)
    images = [(rng.integers(0, 256, (48, 48, 3), np.uint8), 0) for _ in range(6)]
    crop = MultiCrop(global_size=32, local_size=16, local_number=3, patch_side=patch_side)
    batches = [ViewBatches(images, crop, 8, None, 0, distorts=False)[0, step, range(6)] for step in range(2)]
    device = torch.device("cpu")
    shapes = [pixels.shape for pixels in batches[0].pixels]
    distort = cuda_graphs.compiled_distortion(shapes, device, patch_side)
    assert distort is not distort_batch
    for plain, compiled in zip(
        batches_on_device(batches, device), batches_on_device(batches, device, distort), strict=True
    ):
        for view, own in zip(plain.views, compiled.views, strict=True):
            difference = (view - own).abs() * 255 * 0.225  # in levels
            assert difference.max() < (40 if patch_side else 1.1)  # posterization turns one level into 32
            assert difference.mean() < (0.1 if patch_side else 0.01)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_a_distortion_that_does_not_compile_stays_plain(monkeypatch, capsys):
    def compile(*_, **__):
        return lambda *_: 1 / 0

    monkeypatch.setattr(torch, "compile", compile)
    assert cuda_graphs.compiled_distortion([(2, 3, 8, 8)], torch.device("cpu")) is distort_batch
    assert capsys.readouterr().err == "warning: the distortion on the device is not compiled: division by zero\n"
