"""What is fast on a GPU: compiled blocks and distortion, and CUDA graphs, which start a backbone's kernels at once.

At the batch sizes of the paper, a GPU waits for the CPU, which starts some 2,000 kernels per step. Head, loss and
optimizer stay outside the graphs, because the number of matched tokens differs from step to step.
"""

import gc
import time
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from augment import PATCH_ROW_LENGTH, ROW_LENGTH, Distort, distort_batch
from utils import UserError, first_line, is_first_process, warn
from vision_transformer import BackboneWithHead, Teacher, VisionTransformer


def accelerate(
    teacher: Teacher,
    student: BackboneWithHead,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | None,
    *,
    compiles: bool | None,
    graphs: bool,
    accumulates: bool,
    distorts: bool,
    patch_side: int = 0,
) -> tuple[Distort, str]:
    """Compile the blocks of both backbones. On a GPU, also compile the distortion, and capture the backbones in graphs.

    To be called before DDP wraps the student, and while no other thread uses the GPU. Afterwards, parameters may change
    only in place. If the capture fails, a warning says so, and the backbones run without graphs and compilation.

    Args:
        shapes: [n, 3, S, S] of each tensor of the student's views. The teacher sees the first one.
        dtype: precision of autocast, or None.
        compiles: None compiles on a GPU, if there is a compiler.
        graphs: capture graphs, unless activations are recomputed in the backward pass or the device is a CPU.
        accumulates: whether the gradients of several micro-batches are added up.
        distorts: whether the device distorts the views.
        patch_side: side of the patches that are distorted on their own; 0: none are.

    Returns:
        (`distort_batch`, on a GPU compiled if the blocks are; what was done, for the first line of the log)

    Raises:
        UserError: there is no compiler, but `compiles` is true.
    """
    start, done = time.perf_counter(), []
    distort: Distort = distort_batch
    device = next(student.parameters()).device
    on_gpu = device.type == "cuda"
    graphs = graphs and on_gpu and not student.backbone.grad_checkpointing
    if graphs and is_first_process():
        print("preparing the backbones ...", flush=True)  # with compilation, for many seconds
    blocks = (*teacher.backbone.blocks, *student.backbone.blocks)
    if on_gpu if compiles is None else compiles:
        torch.compiler.reset()  # the number of programs is limited, and those of an earlier training count
        try:
            torch.compile(lambda x: x + 1)(torch.zeros(8, device=device))
        except Exception as error:  # many kinds: the compiler is missing or fails
            problem = f"--compile needs a working compiler, found: {first_line(error)}"
            if compiles:
                raise UserError(problem) from error
            warn(f"{problem}; the blocks are not compiled")
        else:
            # All blocks of a backbone share one program per shape of the tokens. It is compiled when it is needed.
            for block in blocks:
                block.compile(dynamic=False)
            done.append("compiled blocks")
            distort = compiled_distortion(shapes, device, patch_side) if distorts and on_gpu else distort
    if graphs:
        try:
            capture(teacher, student, shapes, dtype, accumulates)
        except Exception as error:  # many kinds: a backbone waits for the device, a block does not compile, no memory
            warn(f"the backbones run without CUDA graphs and compilation: {first_line(error)}")
            for block in blocks:
                block.compile(disable=True)
            return distort, ""
        done.append(f"CUDA graphs after {time.perf_counter() - start:.0f} s")
    return distort, " and ".join(done)


def compiled_distortion(shapes: Sequence[tuple[int, ...]], device: torch.device, patch_side: int = 0) -> Distort:
    """Return `distort_batch`, compiled for views of these shapes. If that fails, a warning says so, and it is not.

    Args:
        patch_side: see `accelerate`.
    """
    # The blur has a channel per image and color, which would be slow as the last dimension in memory.
    compiled = torch.compile(distort_batch, dynamic=False, options={"layout_optimization": False})
    try:
        for shape in shapes:
            pixels = torch.zeros(shape, dtype=torch.uint8, device=device).contiguous(memory_format=torch.channels_last)
            rows = torch.zeros(shape[0], ROW_LENGTH, device=device)
            patches = None
            if patch_side:
                patches = torch.zeros(shape[0], (shape[-1] // patch_side) ** 2, PATCH_ROW_LENGTH, device=device)
            compiled(pixels, rows, patches)
    except Exception as error:  # many kinds
        warn(f"the distortion on the device is not compiled: {first_line(error)}")
        return distort_batch
    return compiled


def capture(
    teacher: Teacher,
    student: BackboneWithHead,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype | None,
    accumulates: bool,
) -> None:
    """Capture both backbones in CUDA graphs, which the method `encode` of the networks replays; see `accelerate`.

    Each call of `encode` overwrites the tokens that the last one returned.
    """
    gc.collect()  # graphs of an earlier training must not be freed during the capture
    device = next(student.parameters()).device
    networks, functions, samples = (teacher, student), [], []  # in the order of a step: they share a pool of memory
    for network, own in zip(networks, (shapes[:1], shapes), strict=True):
        functions.append(_function(network.backbone, len(own), dtype))
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            inputs = _inputs(network.backbone, [torch.zeros(shape, device=device) for shape in own])
        # The same memory as the parameters, but other tensors: autograd adds gradients up on the stream where it first
        # meets a tensor, which is not to be that of the capture.
        weights = [nn.Parameter(p.data, requires_grad=p.requires_grad) for p in network.backbone.parameters()]
        samples.append((*inputs, *weights))
    _refuse_waiting(functions, samples)
    with torch.cuda.stream(torch.cuda.current_stream()):  # restores the stream, which a failed capture leaves set
        graphs = torch.cuda.make_graphed_callables(tuple(functions), tuple(samples), allow_unused_input=True)
    for network, graph, sample in zip(networks, graphs, samples, strict=True):
        network.encode = _replay(network, graph, sample)  # type: ignore
    if accumulates:
        # Autograd keeps the first gradient where the graph wrote it, and where the graph will write the next one.
        for parameter in filter(lambda p: p.requires_grad, student.backbone.parameters()):
            parameter.register_hook(torch.clone)
    torch.cuda.empty_cache()  # of what only the capture needed


@torch.no_grad()
def _refuse_waiting(functions: Sequence[Callable], samples: Sequence[tuple[Tensor, ...]]) -> None:
    """Raise RuntimeError if a function waits for the device. A capture would fail, and might spoil later ones."""
    with warnings.catch_warnings(), torch.compiler.set_stance("force_eager"):
        warnings.simplefilter("ignore")  # the mode may overlook some waits, and says so
        torch.cuda.set_sync_debug_mode("error")
        try:
            for function, sample in zip(functions, samples, strict=True):
                function(*sample)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _inputs(backbone: VisionTransformer, views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the views and, with stochastic depth, what is drawn for each of them: no graph holds random numbers."""
    drop_paths = [backbone.draw_drop_paths(len(view)) for view in views]
    return (*views, *(drawn for drawn in drop_paths if drawn is not None))


def _function(backbone: VisionTransformer, count: int, dtype: torch.dtype | None) -> Callable[..., tuple[Tensor, ...]]:
    """Return the function that is captured: `_inputs` for `count` tensors of views, and all parameters -> tokens."""
    names = [name for name, _ in backbone.named_parameters()]
    linear = [f"{name}.weight" for name, layer in backbone.named_modules() if isinstance(layer, nn.Linear)]
    linear = [name for name in linear if name in names]  # a weight may be shared or computed

    def encode(*tensors: Tensor) -> tuple[Tensor, ...]:
        inputs, weights = tensors[: -len(names)], dict(zip(names, tensors[-len(names) :], strict=True))
        # Autocast is entered here, because its cache must be empty before and after a capture. The cache casts a
        # parameter once for all views, except in compiled blocks, which get weights that are cast already.
        with torch.autocast(inputs[0].device.type, dtype, enabled=dtype is not None):
            if dtype is not None:
                weights |= {name: weights[name].to(dtype) for name in linear}
            return tuple(functional_call(backbone, weights, inputs[i::count]) for i in range(count))

    return encode


def _replay(
    network: BackboneWithHead, graph: Callable[..., tuple[Tensor, ...]], sample: tuple[Tensor, ...]
) -> Callable[[Sequence[Tensor]], Sequence[Tensor]]:
    """Return the method `encode` that replays the graph for inputs like those of the capture."""
    plain, parameters = network.encode, list(network.backbone.parameters())
    captured = [(x.shape, x.dtype) for x in sample[: -len(parameters)]]

    def encode(views: Sequence[Tensor]) -> Sequence[Tensor]:
        inputs = _inputs(network.backbone, views)
        is_captured = [(x.shape, x.dtype) for x in inputs] == captured
        return graph(*inputs, *parameters) if is_captured else plain(views)

    return encode
