"""Eight fake CPU devices for every test, set before anything imports jax; few examples, no deadline."""

import os

os.environ['XLA_FLAGS'] = (
    os.environ.get('XLA_FLAGS', '') + ' --xla_force_host_platform_device_count=8').strip()
os.environ['JAX_PLATFORMS'] = 'cpu'

import hypothesis  # pylint: disable=wrong-import-position

hypothesis.settings.register_profile('few', max_examples=12, deadline=None)
hypothesis.settings.load_profile('few')
