"""A GPU that computes nothing: what would be launched on one, counted on a machine that has none.

Tensors on `cuda` are fake ones (shapes and dtypes, no values), so networks of any size run in no memory. Everything
else is real: the trainers' code, autograd, dynamo, AOTAutograd and inductor's code generation for compute capability
9.0, and this project's Triton ops up to the launch of each kernel. What is faked, all of it in `install`:

- torch.cuda and its driver: a device that is there, with an H200's properties, and never waits;
- Triton's driver: a target to generate for. Nothing is compiled to machine code, nothing can be timed;
- the last call of each path: an op of torch on a tensor, a kernel that inductor made, a kernel that
  `triton_kernels.common.launch` starts. Each is recorded with the bytes it must move at least and its FLOPs.

Bytes are counted once per tensor and direction: a kernel that reads something twice is taken to find it in the cache.
To be installed before anything touches torch.cuda, in a process of its own: nothing is put back.
Names inside torch are used here and nowhere else; where one is gone, OtherInternals says which.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import hashlib
import importlib
import itertools
import os
import pkgutil
import shutil
import subprocess
import tempfile
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

PROPERTIES = types.SimpleNamespace(
    name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, total_memory=141 * 10**9, warp_size=32,
    max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
    shared_memory_per_block=49152, shared_memory_per_block_optin=232448, shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 * 2**20, is_integrated=0, uuid="0", clock_rate=1980000,
)  # fmt: skip
"""What inductor asks of the device (data sheet, CUDA programming guide)."""


class OtherInternals(RuntimeError):
    """This torch or Triton has other internals than those that are replaced here."""


class Launch(NamedTuple):
    """One kernel on the device."""

    phase: str
    kind: str  # matmul, conv, attention or other.
    name: str
    bytes: int
    flops: int = 0
    arithmetic: str = ""  # Of products: bf16, tf32, fp32 or fp8.


# ------------------------------------------------------------------------------------------------ recording

HOST_READS = {"_local_scalar_dense": 1, "is_nonzero": True, "equal": True}
"""Ops whose result the host waits for, and what it is told where there are no values."""
NO_KERNEL = {"set_", "resize_", "record_stream"}
ONLY_WRITE = {"copy_", "fill_", "zero_", "normal_", "uniform_", "bernoulli_", "random_", "_foreach_copy_"}
"""In-place ops that do not read what they write over."""
KERNELS = {
    "_scaled_dot_product_flash_attention_backward": 3, "_scaled_dot_product_cudnn_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2, "native_layer_norm_backward": 2,
    "native_group_norm": 2, "native_group_norm_backward": 3, "convolution_backward": 2,
}  # fmt: skip
"""Launches of ops that have more than one, from reading torch's sources; the further ones count no bytes."""
READ_TWICE = {"native_group_norm": 1, "native_group_norm_backward": 2}
"""Leading inputs that torch's kernels read twice, for the sums and for the result: too large for the cache."""


class VirtualGPU(TorchDispatchMode):
    """Records what runs on fake `cuda` tensors while `recording`.

    With "cpu", on real ones there: those that follow from `weights` then stand for what a GPU would hold.
    """

    current: VirtualGPU  # The last one made: what kernels without a dispatcher report to.

    def __init__(self, device: str = "cuda", weights: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.device = device
        self._followed = {weight.untyped_storage()._cdata for weight in weights}
        self.launches: list[Launch] = []
        self.host_waits: list[str] = []
        """Reads of values, and copies between host and device that are not asynchronous."""
        self.held = 0  # Bytes of the tensors made while recording that are alive.
        self.phase = ""
        self.changed: set[int] = set()  # Storages that the Triton op under way changes in place.
        self._on = False
        self._known: set[int] = set()
        VirtualGPU.current = self

    @classmethod
    def is_infra_mode(cls) -> bool:
        """Dynamo compiles under it as if it were not there."""
        return True

    @contextlib.contextmanager
    def recording(self, phase: str) -> Iterator[None]:
        """What runs in the block is counted, as `phase`."""
        self._on, self.phase = True, phase
        try:
            with self:
                yield
        finally:
            self._on = False

    def record(self, kind: str, name: str, size: int, flops: int = 0, arithmetic: str = "") -> None:
        """Count one launch."""
        if self._on:
            self.launches.append(Launch(self.phase, kind, name, size, flops, arithmetic))

    def wait(self, name: str) -> None:
        """Count one wait of the host."""
        if self._on:
            self.host_waits.append(f"{self.phase}: {name}")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = _written(func, args, kwargs)
        if func.namespace == "vadit_triton":  # the op's own Python, down to `_launch`
            self.changed = {t.untyped_storage()._cdata for t in written}
            with self:
                return _triton_op(name)(*args)
        before = {t.untyped_storage()._cdata for t in ins}
        if name in HOST_READS and self.device == "cuda" and any(t.device.type == "cuda" for t in ins):
            self.wait(name)
            return HOST_READS[name]
        if name in HOST_READS and before & self._followed:
            self.wait(name)
        if self.device == "cuda" and _on_host(ins, kwargs):  # times of a sampler, say: the host decides by their values
            with unset_fake_temporarily():
                return func(*args, **kwargs)
        if func is torch.ops.aten._scaled_mm.out:  # has no fake of its own
            result = kwargs["out"]
        else:
            result = func(*args, **kwargs)
        outs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t for t in outs if t.untyped_storage()._cdata not in before]
        for tensor in made:
            self._hold(tensor)
        if before & self._followed:
            self._followed |= {t.untyped_storage()._cdata for t in (*made, *written)}
        elif self.device == "cpu":  # the host's own counters
            return result
        devices = {t.device.type for t in (*ins, *outs)}
        # views, memory without values, and other devices' work
        if not (made or written) or "empty" in name or name in NO_KERNEL or self.device not in devices:
            return result
        if name in ("_to_copy", "copy_") and len(devices) > 1 and not (kwargs.get("non_blocking") or any(args[2:3])):
            self.wait(name)
        over = {id(t) for t in written} if name in ONLY_WRITE or "out" in kwargs else set()
        read = [t for t in ins if id(t) not in over]
        size = sum(map(_bytes, (*read, *made, *written, *read[: READ_TWICE.get(name, 0)])))
        if name in ("embedding", "index", "gather", "index_select"):  # reads a part of the table
            size = 2 * sum(map(_bytes, made))
        formula = flop_registry.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        kind = next((k for k in ("attention", "conv") if k in name), "matmul") if formula else "other"
        arithmetic = _arithmetic(kind, read) if flops else ""
        for _ in range(KERNELS.get(name, 1) - 1):
            self.record(kind, f"{name} (more)", 0)
        self.record(kind, name, size, flops, arithmetic)
        backward = name.endswith("backward")
        if kind == "conv" and arithmetic != "fp32" and args[1 + backward].shape[2:].numel() > 1:
            # cuDNN's kernels for tensor cores copy what has not its channels innermost (1x1 ones are plain products)
            self._turn_round(name, (args[0], args[1] if backward else made[0], made[0]), torch.channels_last)
        elif name.startswith("native_group_norm"):  # as ATen's on CUDA want it
            self._turn_round(name, args[: 1 + backward], torch.contiguous_format)
        return result

    def _turn_round(self, name: str, tensors: Sequence[Tensor], layout: torch.memory_format) -> None:
        """Count copies of the images among `tensors` that lie otherwise."""
        for tensor in {id(t): t for t in tensors if t is not None and t.ndim == 4}.values():
            if not tensor.is_contiguous(memory_format=layout):
                self.record("other", f"{name} (layout)", 2 * _bytes(tensor))

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if self._on and tensor.device.type == self.device and key not in self._known:
            self._known.add(key)
            self.held += size
            weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._followed.discard(key)
        self.held -= size


@contextlib.contextmanager
def fake() -> Iterator[FakeTensorMode]:
    """Tensors without values; autograd in this thread, for there is no device to have a thread."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.autograd.set_multithreading_enabled(False):
        yield mode


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor's different elements: an expanded axis is read once."""
    size = tensor.element_size() if tensor.numel() else 0
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        size *= length if stride else 1
    return size


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Tensors that an op writes in place, by its schema."""
    found: list[Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        if func.__name__.startswith("_fused_adam") and argument.name == "grads":
            continue  # written only where they are unscaled
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        found += [t for t in tree_leaves(value) if isinstance(t, Tensor)]
    return found


def _on_host(ins: list[Tensor], kwargs: Any) -> bool:
    """Whether an op is one of real tensors on the CPU alone."""
    real = all(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in ins)
    return real and torch.device(kwargs.get("device") or "cpu").type == "cpu"


def _arithmetic(kind: str, read: list[Tensor]) -> str:
    """What a product computes in, by the dtype of its larger inputs and torch's settings."""
    dtype = max(read, key=lambda t: t.numel()).dtype
    if dtype.itemsize == 1:
        return "fp8"
    if dtype != torch.float32:
        return "bf16"
    allowed = torch.backends.cudnn.allow_tf32 if kind == "conv" else torch.backends.cuda.matmul.allow_tf32
    return "tf32" if allowed and kind != "attention" else "fp32"


# ------------------------------------------------------------------------------------------------ this project's ops


@functools.cache
def _triton_op(name: str) -> Callable[..., Any]:
    """The function in vadit.kernels.triton_kernels that an op of that name calls."""
    from vadit.kernels import triton_kernels

    for found in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{found.name}")
        if callable(function := getattr(module, name, None)):
            return function
    raise LookupError(f"no module of {triton_kernels.__name__} has {name}")


def _launch(kernel: Any, decide: Any, sizes: Any, *tensors: Tensor | None) -> None:
    """In place of `common.launch`: a kernel reads or writes each tensor once; what its op changes in place, both."""
    device = VirtualGPU.current
    size = sum(_bytes(t) * (1 + (t.untyped_storage()._cdata in device.changed)) for t in tensors if t is not None)
    device.record("other", f"{kernel.__module__.split('.')[-1]}.{kernel.__name__.strip('_')}", size)


# ------------------------------------------------------------------------------------------------ inductor's kernels


class _Generated:
    """A kernel that inductor made: called, it is a launch."""

    sizes: ClassVar[dict[str, int]] = {}
    """Bytes by the name of a kernel of the graph under way (another graph numbers its own from 0)."""

    def __init__(self, name: str) -> None:
        self.name, self.size = name, self.sizes[name]

    def run(self, *args: Any, **kwargs: Any) -> None:
        VirtualGPU.current.record("other", self.name, self.size)


def _generated_bytes(kernel: Any) -> int:
    """Bytes of device memory that a generated kernel touches, each once per direction."""
    from torch._inductor.codegen.common import RemovedArg
    from torch._inductor.virtualized import V

    accesses = kernel.features.buf_accesses()
    inplace = {id(b): b for b in kernel.args.inplace_buffers.values() if not isinstance(b, RemovedArg)}.values()
    names = [*kernel.args.input_buffers]
    names += [name for name, arg in kernel.args.output_buffers.items() if not isinstance(arg, RemovedArg)]
    names += [name for b in inplace for name in (b.other_names[0], b.other_names[-1])]
    total = 0
    for name in names:
        numel = int(V.graph.sizevars.optimization_hint(V.graph.get_numel(name)))
        parts: dict[Any, int] = {}  # elements of each slice that is touched, by its first element
        for dep in accesses.get(name, ()):
            try:
                key, count = _first_element(dep), int(V.graph.sizevars.optimization_hint(dep.get_numel()))
            except (AttributeError, TypeError):  # known at run time only
                key, count = None, numel
            parts[key] = max(parts.get(key, 0), count)
        total += V.graph.get_dtype(name).itemsize * min(numel, sum(parts.values()) or numel)
    return total


def _first_element(dep: Any) -> int:
    """The lowest index that an access reaches near its loops' start: ways of indexing the same slice share it."""
    corners = itertools.product(*((0, 1) if int(size) > 1 else (0,) for size in dep.size))
    return min(int(dep.index.subs(dict(zip(dep.var_names, corner, strict=True)))) for corner in corners)


# ------------------------------------------------------------------------------------------------ installing


def _replace(owner: Any, **names: Any) -> None:
    """Set attributes that are there."""
    for name, value in names.items():
        if not hasattr(owner, name):
            where = getattr(owner, "__name__", owner)
            raise OtherInternals(f"torch {torch.__version__} has other internals: {where}.{name} is gone")
        setattr(owner, name, value)


class _Stream:
    """A stream that everything can be asked of."""

    cuda_stream = stream_id = device_index = 0
    device_type = 1

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def install() -> None:
    """Make torch, inductor and Triton believe in a GPU of compute capability 9.0.

    Raises OtherInternals, also where the small library beside this file cannot be built.
    """
    if torch.cuda.is_available():
        raise OtherInternals("this machine has a GPU; run with CUDA_VISIBLE_DEVICES= (empty)")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder = tempfile.mkdtemp(prefix="virtual-gpu-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    try:
        _library().patch()
        _install_torch()
        _install_triton()
        _install_inductor()
    except (ImportError, AttributeError) as error:
        raise OtherInternals(f"torch {torch.__version__} has other internals: {error}") from error
    from vadit.kernels.triton_kernels import common

    common.launch = _launch


def _library() -> ctypes.CDLL:
    """virtual_gpu.cpp, compiled on first use into the user's cache folder."""
    source = Path(__file__).with_suffix(".cpp")
    name = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vadit"
    built = cache / f"virtual-gpu-{name}.so"
    if not built.is_file():
        from torch.utils.cpp_extension import include_paths

        cache.mkdir(parents=True, exist_ok=True)
        part = built.with_suffix(f".{os.getpid()}")
        headers = [f"-I{path}" for path in include_paths()]
        libraries = [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu", "-lc10"]
        command = ["c++", "-O1", "-fPIC", "-shared", "-std=c++20", *headers, str(source), *libraries, "-o", str(part)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError as error:
            raise OtherInternals("a C++ compiler (c++) is needed once, and there is none") from error
        if done.returncode:
            raise OtherInternals(f"torch {torch.__version__} has other internals: {done.stderr.strip()[:500]}")
        part.replace(built)
    return ctypes.CDLL(str(built))


def _install_torch() -> None:
    from torch._dynamo import device_interface
    from torch._subclasses import fake_tensor

    torch._C._ensureCUDADeviceGuardSet()
    said: dict[str, Any] = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "synchronize": None,
        "get_device_capability": (9, 0), "get_device_name": PROPERTIES.name, "get_device_properties": PROPERTIES,
        "is_bf16_supported": True, "is_tf32_supported": True, "current_stream": _Stream(), "_exchange_device": 0,
        "_maybe_exchange_device": 0, "mem_get_info": (PROPERTIES.total_memory,) * 2,
    }  # fmt: skip
    answers = {name: lambda *args, _value=value, **kwargs: _value for name, value in said.items()}
    state = torch.zeros(16, dtype=torch.uint8)
    _replace(torch.cuda, **answers, _lazy_init=lambda: None, is_initialized=lambda: False)
    for module in (torch.cuda, torch.cuda.random):
        _replace(module, get_rng_state=lambda *a, **k: state, set_rng_state=lambda *a, **k: None)
    for module in (torch.cuda, torch.cuda.graphs):
        _replace(module, is_current_stream_capturing=lambda: False)
    torch._C._cuda_getCurrentRawStream = lambda *args: 0
    torch._C._cuda_setDevice = lambda *args: None
    _replace(fake_tensor, init_gpu_context=lambda device: None)
    _replace(FakeTensorMode, avoid_device_init=property(lambda self: True))
    _replace(torch._C, _conv_determine_backend_memory_format=_layout_of_convolution)  # there is no cuDNN to ask
    interface = device_interface.CudaInterface
    for name, answer in answers.items():
        if (plain := name.lstrip("_")) in vars(interface):
            setattr(interface, plain, staticmethod(answer))
    _replace(interface, get_raw_stream=staticmethod(lambda *args: 0))
    here = {"current_device": 0, "get_device_properties": PROPERTIES}
    _replace(interface.Worker, **{n: staticmethod(lambda *args, _v=v: _v) for n, v in here.items()})
    torch.nn.functional.scaled_dot_product_attention = _attention


def _layout_of_convolution(x: Tensor, weight: Tensor, backend: Any) -> torch.memory_format:
    """Channels innermost where input or weight have them so, as ATen asks of cuDNN."""
    last = any(t.ndim == 4 and t.is_contiguous(memory_format=torch.channels_last) for t in (x, weight))
    return torch.channels_last if last else torch.contiguous_format


def _attention(q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The kernels that an H200 would take, by dtype: cuDNN's, in fp32 the memory-efficient one. No mask, no dropout."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    if q.dtype == torch.float32:
        return torch.ops.aten._scaled_dot_product_efficient_attention(q, k, v, None, True)[0]
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, False, False)[0]


def _install_triton() -> None:
    import triton
    from triton.backends.compiler import GPUTarget

    limits = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    answers = {
        "get_current_target": GPUTarget("cuda", 90, 32), "get_current_device": 0, "set_current_device": None,
        "get_current_stream": 0, "get_active_torch_device": torch.device("cuda", 0), "get_device_properties": limits,
    }  # fmt: skip
    driver = types.SimpleNamespace(**{n: lambda *args, _v=v, **kw: _v for n, v in answers.items()})
    driver.utils = types.SimpleNamespace(get_device_properties=lambda *args: limits)
    triton.runtime.driver.set_active(driver)


def _install_inductor() -> None:
    import torch._functorch.config as functorch_config
    import torch._inductor.compile_fx as compile_fx
    import torch._inductor.config as config
    import torch._inductor.output_code as output_code
    import torch._inductor.utils as utils
    from torch._inductor.async_compile import AsyncCompile
    from torch._inductor.codegen.triton import TritonScheduling

    _replace(config, compile_threads=1, fx_graph_cache=False, force_disable_caches=True)
    # these would compute, and time, on the device
    _replace(config, joint_graph_constant_folding=False, shape_padding=False)
    _replace(functorch_config, enable_autograd_cache=False)
    # what a compiled graph calls at run time: fake tensors have neither addresses nor memory
    guards = torch._C._dynamo.guards
    _replace(
        guards,
        _empty_strided_cuda=lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype, device="cuda"),
        _reinterpret_tensor=lambda t, size, stride, offset=0: t.as_strided(size, stride, t.storage_offset() + offset),
        assert_size_stride=lambda *args, **kwargs: None,
    )
    for name in ("assert_size_stride_grouped", "assert_alignment"):  # of some releases
        setattr(guards, name, lambda *args, **kwargs: None)
    replaced = {
        "copy_misaligned_inputs": lambda inputs, indices, pairs=None: ([], []),
        "remove_unaligned_input_idxs": lambda inputs, indices: indices,
        "tensor_is_aligned": lambda t: t.storage_offset() * t.element_size() % 16 == 0,
    }
    for module in (utils, compile_fx, output_code):
        for name in replaced.keys() & vars(module).keys():
            setattr(module, name, replaced[name])
    _replace(AsyncCompile, triton=lambda self, name, source, **options: _Generated(name), wait=lambda self, scope: None)
    define = TritonScheduling.define_kernel

    def define_kernel(self: Any, source: Any, nodes: Any, kernel: Any, *rest: Any, **more: Any) -> Any:
        name = define(self, source, nodes, kernel, *rest, **more)
        _Generated.sizes[name] = _generated_bytes(kernel)
        return name

    TritonScheduling.define_kernel = define_kernel
