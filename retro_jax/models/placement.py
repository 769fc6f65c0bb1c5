"""Where activations lie on a mesh, as far as the model has a wish.

The model names axes ('batch', 'heads', ...); the trainer says, around the tracing of a
step, what those names mean on which mesh (training/partitioning.py). Outside of that, as in
a notebook or in a test of one module, every function here does nothing.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator, Mapping

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Array = jax.Array
MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where arrays lie.

  Attributes:
    mesh: of the devices.
    axes: mesh axes of each name of an activation's axis.
    parameters: the same for names of parameters' axes; {} leaves parameters to XLA.
  """
  mesh: Mesh
  axes: Mapping[str, MeshAxes]
  parameters: Mapping[str, MeshAxes] = dataclasses.field(default_factory=dict)

  def spec(self, names: tuple[str | None, ...], shape: tuple[int, ...]) -> PartitionSpec:
    """The placement of an array; an axis that does not divide is left whole."""
    entries = []
    for name, size in zip(names, shape, strict=True):
      target = self.axes[name] if name else None
      entries.append(target if size % self._devices(target) == 0 else None)
    return PartitionSpec(*entries)

  def _devices(self, target: MeshAxes) -> int:
    count = 1
    for axis in (target,) if isinstance(target, str) else target or ():
      count *= self.mesh.shape[axis]
    return count


_CURRENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar(
    'placement', default=None)


@contextlib.contextmanager
def on(placement: Placement | None) -> Iterator[None]:
  """What is traced inside lies as `placement` says, or as XLA likes."""
  token = _CURRENT.set(placement)
  try:
    yield
  finally:
    _CURRENT.reset(token)


def on_one_device() -> bool:
  """Whether the program that is being traced is not cut over devices, as far as is known here."""
  current = _CURRENT.get()
  return current is None or current.mesh.size == 1


def on_one_cpu() -> bool:
  """Whether that program is for a CPU and not cut over several."""
  return on_one_device() and platform() == 'cpu'


def place(x: Array, name: str | None = None, axis: int = -1) -> Array:
  """Examples of `x` (its first axis) over the mesh, and with `name` also that axis."""
  if on_one_device():
    return x
  current = _CURRENT.get()
  names: list[str | None] = [None] * x.ndim
  names[0] = 'batch'
  if name:
    names[axis] = name
  spec = current.spec(tuple(names), x.shape)
  return jax.lax.with_sharding_constraint(x, NamedSharding(current.mesh, spec))


def place_parameters(state: nnx.State) -> nnx.State:
  """Parameters as they lie at rest, for the sake of their gradients, which then lie so too.

  The transpose of a constraint is the same constraint: in the backward pass of a scanned layer
  each device keeps its own part of a gradient as soon as there is one, instead of the whole.
  """
  if on_one_device() or not _CURRENT.get().parameters:
    return state
  current = _CURRENT.get()
  placed = []
  for path, variable in nnx.to_flat_state(state):
    value, names = variable.get_value(), variable.get_metadata()['axes']
    spec = PartitionSpec(*(current.parameters[name] for name in names))
    value = jax.lax.with_sharding_constraint(value, NamedSharding(current.mesh, spec))
    placed.append((path, variable.replace(value)))
  return nnx.from_flat_state(placed)


def platform() -> str:
  """'tpu', 'gpu' or 'cpu': what the program that is being traced will run on."""
  return _device().platform


def device_kind() -> str:
  """Which of its platform's devices that program will run on, as 'TPU v4'."""
  return _device().device_kind


def has_cudnn() -> bool:
  """Whether that program will run on NVIDIA's GPUs."""
  device = _device()
  return device.platform == 'gpu' and 'cuda' in device.client.platform_version


def _device() -> jax.Device:
  current = _CURRENT.get()
  return current.mesh.devices.flat[0] if current else jax.devices()[0]


_LETTERS = {'b': 'batch', 'h': 'heads'}


def on_each_device(function: Callable[..., Array], *inputs: str, out: str
                   ) -> Callable[..., Array]:
  """`function` run by every device on its own part of the arrays, for kernels XLA cannot cut.

  Args:
    function: of arrays, without communication between devices.
    inputs: the axes of each argument, a letter each: b examples and h heads are cut.
    out: the same for the result.
  """
  if on_one_device():
    return function
  current = _CURRENT.get()

  def run(*arrays: Array) -> Array:
    spec = lambda axes, x: current.spec(tuple(_LETTERS.get(a) for a in axes), x.shape)
    specs = tuple(spec(axes, x) for axes, x in zip(inputs, arrays, strict=True))
    return jax.shard_map(function, mesh=current.mesh, in_specs=specs,
                         out_specs=spec(out, arrays[0]), check_vma=False)(*arrays)

  return run


def sum_over_examples(
    function: Callable[..., tuple[Array, Array, Array]], of_examples: tuple[bool, ...],
    cut_axis: int, width: int) -> Callable[..., tuple[Array, Array, Array]]:
  """`function` on each device's own examples, its sums added up afterwards.

  XLA would add up a sum inside a loop at every turn of it.

  Args:
    function: of arrays; returns (a scalar sum, an array by example, a sum of parameters' shape).
    of_examples: whether the first axis of each argument is examples; others are whole.
    cut_axis: axis of the last sum over which parameters are cut.
    width: of that axis.
  """
  if on_one_device():
    return function
  current = _CURRENT.get()
  devices = current.mesh.devices
  own = dataclasses.replace(current, mesh=Mesh(
      devices.flat[:1].reshape([1] * devices.ndim), current.mesh.axis_names))
  axes = current.axes['batch']
  axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
  cut = current.axes['parameters']
  cut = cut if cut in axes and width % current.mesh.shape[cut] == 0 else None

  def run(*arguments: Array) -> tuple[Array, Array, Array]:
    with on(own):  # what is left to XLA in here is what it finds itself
      scalar, by_example, total = function(*arguments)
    left = axes
    if cut:
      total = jax.lax.psum_scatter(total, cut, scatter_dimension=cut_axis, tiled=True)
      left = tuple(name for name in axes if name != cut)
    return jax.lax.psum(scalar, axes), by_example, jax.lax.psum(total, left) if left else total

  return jax.shard_map(
      run, mesh=current.mesh, axis_names=set(axes), check_vma=False,
      in_specs=tuple(PartitionSpec(axes) if own else PartitionSpec() for own in of_examples),
      out_specs=(PartitionSpec(), PartitionSpec(axes), PartitionSpec(*[None] * cut_axis, cut)))
