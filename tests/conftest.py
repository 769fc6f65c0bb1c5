"""Eight fake CPU devices for every test, set before anything imports jax; no deadlines.

XLA optimizes less than by default: tests compile many small programs and run each a few
times, and without LLVM's passes that takes half the time. What is already set wins: with
`JAX_PLATFORMS=cuda JAX_DEFAULT_MATMUL_PRECISION=float32` those of one device run on a GPU.
"""

import os

_FLAGS = {'--xla_force_host_platform_device_count': '8', '--xla_backend_optimization_level': '0'}

_given = os.environ.get('XLA_FLAGS', '')
os.environ['XLA_FLAGS'] = ' '.join(
    [_given, *(f'{name}={value}' for name, value in _FLAGS.items() if name not in _given)]).strip()
os.environ.setdefault('JAX_PLATFORMS', 'cpu')

import hypothesis  # pylint: disable=wrong-import-position

hypothesis.settings.register_profile('few', max_examples=12, deadline=None)
hypothesis.settings.load_profile('few')


def pytest_addoption(parser):
  parser.addoption('--update_golden', action='store_true',
                   help='write tests/golden anew instead of comparing with it')
