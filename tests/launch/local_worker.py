"""What the tests run in local_pod.sh: one way to behave for each name; no tests here.

  python -m tests.launch.local_worker psum | fail CODE | wait FILE
"""

import os
import signal
import sys
import time

PROCESS = int(os.environ['RETRO_PROCESS_ID'])


def psum() -> None:
  """Joins the others and sums 1 over all devices."""
  import jax
  import jax.numpy as jnp
  jax.distributed.initialize(
      os.environ['RETRO_COORDINATOR'], int(os.environ['RETRO_NUM_PROCESSES']), PROCESS,
      initialization_timeout=int(os.environ['RETRO_START_TIMEOUT']))
  ones = jnp.ones(jax.local_device_count())
  total = jax.pmap(lambda x: jax.lax.psum(x, 'devices'), axis_name='devices')(ones)
  print(f'{jax.process_index()} of {jax.process_count()}: {jax.local_device_count()} devices here, '
        f'sum {float(total.addressable_shards[0].data.sum()):.0f}', flush=True)


def fail(code: str) -> None:
  """Process 1 ends with `code`; the others wait for a signal."""
  if PROCESS == 1:
    sys.exit(int(code))
  time.sleep(60)


def wait(folder: str) -> None:
  """Says that it runs, and on SIGTERM or SIGINT that it was stopped."""

  def stop(number: int, _: object) -> None:
    print(f'stopped by {signal.Signals(number).name}', flush=True)
    sys.exit(75)

  signal.signal(signal.SIGTERM, stop)
  signal.signal(signal.SIGINT, stop)
  with open(os.path.join(folder, str(PROCESS)), 'w', encoding='utf-8'):
    pass
  time.sleep(60)


def stubborn(folder: str) -> None:
  """Like `fail`, but process 0 does not end on SIGTERM, nor does what it started."""
  if PROCESS == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with open(os.path.join(folder, '0'), 'w', encoding='utf-8') as f:
      f.write(str(os.getpid()))
    time.sleep(60)
  while not os.path.exists(os.path.join(folder, '0')):
    time.sleep(0.02)
  sys.exit(2)


if __name__ == '__main__':
  {'psum': psum, 'fail': fail, 'wait': wait, 'stubborn': stubborn}[sys.argv[1]](*sys.argv[2:])
