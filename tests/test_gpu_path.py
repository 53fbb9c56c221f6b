"""The GPU path of a decode step without a GPU: fake CUDA tensors, and launches that are looked at instead of made.

A fake tensor has a shape and a device but no values: reading one, or mixing devices, raises. So what runs through here
cannot make the host wait. The kernels themselves are tested in triton_interpreted.py and test_triton_aot.py.
"""

import importlib.util
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from books import layer_book
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from transformers_commvq import CommVQConfig, positions
from transformers_commvq.attention import commvq_attention
from transformers_commvq.layer import FLUSH, Call, CommVQLayer, current
from transformers_commvq.ops import BACKENDS, gpu
from transformers_commvq.positions import PositionTrack
from transformers_commvq.rope import Rope, angles

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if not torch.backends.cuda.is_built():
    pytest.skip("indexing fake CUDA tensors takes a CUDA build of torch (no GPU, though)", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import create_function_from_signature

from transformers_commvq.ops import attention_triton, encode_triton
from transformers_commvq.ops.triton_tables import BLOCK

DEVICE = torch.device("cuda", 0)
HEADS, KV_HEADS, DIM, UNITS = 4, 2, 32, 132
TARGET = triton.compiler.make_backend(GPUTarget("cuda", 90, 32))


class Launches:
    """Stands in for a kernel: notes which compiled variant each launch would take, as Triton's launcher finds it."""

    def __init__(self, kernel):
        self.variant = create_function_from_signature(kernel.signature, kernel.params, TARGET)
        self.keys = []

    def __getitem__(self, grid):
        assert all(isinstance(n, int) and n > 0 for n in grid)

        def launch(*args, **kwargs):
            args = [_Pointer(a) if isinstance(a, torch.Tensor) else a for a in args]
            _, specialization, options = self.variant(*args, **kwargs)
            self.keys.append(str(specialization) + str(sorted(options.items())))

        return launch


class _Pointer:
    """A tensor as a launcher sees it. Allocators align tensors; views begin where they begin."""

    def __init__(self, tensor):
        assert tensor.device == DEVICE
        self.dtype = tensor.dtype
        self.address = tensor.storage_offset() * tensor.element_size()

    def data_ptr(self):
        return self.address

    def ptr_range(self):
        return 0


class NoCopies(TorchDispatchMode):
    """Between devices: a copy to the host waits for the device, one to the device for the host's memory."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {t.device.type for t in (*args[:2], out) if isinstance(t, torch.Tensor)}
            assert devices == {"cuda"}, f"{function} between {devices}"
        return out


class Allocated(TorchDispatchMode):
    """Bytes of new storage that operations make."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        old = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, torch.Tensor)}
        out = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in old:
                self.storages[id(t.untyped_storage())] = t.untyped_storage()
        return out

    @property
    def nbytes(self):
        return sum(s.nbytes() for s in self.storages.values())


class Cache:
    """The layers of one cache on the device that is not there, filled by one prompt."""

    def __init__(self, tokens, batch=1, layers=1, value_bits=(32, 40), **config):
        self.batch, self.module = batch, torch.nn.Module()
        book = layer_book((24, 40), value_bits, DIM).to(DEVICE)
        self.track = PositionTrack(1e4 ** (-torch.arange(DIM // 2) / (DIM // 2)), 1.0)
        self.layers = [CommVQLayer(book, CommVQConfig(**config), Rope("half", DIM), self.track) for _ in range(layers)]
        for layer in self.layers:
            current.call, _, key, value = self._call(layer, tokens)
            layer.update(key, value)
            layer.append(key, value, None)
        self.step()

    def _call(self, layer, new):
        start = layer.cumulative_length
        position = torch.arange(start, start + new, device=DEVICE).expand(self.batch, new)
        cos, sin = angles(position, self.track.frequencies(DEVICE))
        query, key, value = (
            torch.empty(self.batch, n, new, DIM, dtype=torch.bfloat16, device=DEVICE)
            for n in (HEADS, KV_HEADS, KV_HEADS)
        )
        return Call(self.module, layer, cos, sin, position, None, fused=True), query, key, value

    def step(self):
        """One token through every layer."""
        for layer in self.layers:
            current.call, query, key, value = self._call(layer, 1)
            out, _ = commvq_attention(self.module, query, *layer.update(key, value), None)
            assert out.shape == (self.batch, 1, HEADS, DIM) and out.device == DEVICE


@pytest.fixture
def launches(monkeypatch):
    """Fake CUDA tensors inside this test. Returns the launches of each kernel, and the values read by the host."""
    kernels = {}
    for module, names in (
        (attention_triton, ("attend_splits", "merge_splits")),
        (encode_triton, ("improve_signs", "pack_signs")),
    ):
        for name in names:
            kernels[name] = Launches(getattr(module, name))
            monkeypatch.setattr(module, name, kernels[name])
    reads = []
    monkeypatch.setattr(positions, "_read", lambda values: reads.append(values.numel()) or [True, False])
    monkeypatch.setattr(PositionTrack, "_agree", lambda *a: True)  # a prompt is compared, which waits; steps are not
    monkeypatch.setattr(CommVQLayer, "_find_sinks", sinks_known)
    for check in ("self_check", "encoder_check"):
        monkeypatch.setattr(gpu, check, lambda *of: None)
    monkeypatch.setitem(BACKENDS, "triton", gpu.attention_gpu)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(attention_triton, "multiprocessors", lambda device: UNITS)
    monkeypatch.setattr(current, "call", None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield SimpleNamespace(**kernels, reads=reads)


def sinks_known(layer, mask):
    """What a prompt without padding leaves; reading it from the device is a matter of the prompt."""
    layer.sink_start, layer._sinks_known, layer._sinks_end = torch.zeros_like(layer.sink_start), True, layer.sink_tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decode_step_makes_the_host_wait_for_nothing(launches, batch):
    """Neither does a step that encodes, but for one look, for the whole cache, whether positions are consecutive."""
    cache = Cache(3 * FLUSH - 3, batch, layers=2, residual_length=0)
    waited = []
    for _ in range(4):
        launches.reads.clear()
        before = cache.layers[0].coded
        with NoCopies():
            cache.step()
        waited.append((cache.layers[0].coded - before, len(launches.reads)))
    assert waited == [(0, 0), (FLUSH, 1), (0, 0), (0, 0)]
    assert len(launches.improve_signs.keys) == len(launches.pack_signs.keys) == 2 * 2 * 2  # prompt, step; layers; sides


def test_nothing_is_compiled_anew_as_a_cache_grows(launches):
    """One variant of each kernel serves every length, row stride and step."""
    for tokens in (200, 1000, 5001, 40_000):
        cache = Cache(tokens)
        cache.step()
    for name in ("attend_splits", "merge_splits", "improve_signs", "pack_signs"):
        keys = getattr(launches, name).keys
        assert len(keys) >= 8 and len(set(keys)) == 1, name


def test_other_settings_are_another_variant(launches):
    """The watch itself works."""
    Cache(300)
    Cache(300, value_bits=(160, 40))
    assert len(set(launches.attend_splits.keys)) == 2


def test_a_decode_step_allocates_the_same_at_every_length(launches):
    needed = []
    for blocks in (UNITS, 3 * UNITS):  # of which every split gets as many
        cache = Cache(blocks * BLOCK + 130)
        with Allocated() as allocated:
            cache.step()
        needed.append(allocated.nbytes)
    assert needed[0] == needed[1] > 0
