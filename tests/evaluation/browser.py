"""A browser without a window, for what a parser cannot show: that a page does nothing.

`find` gives Chromium or Chrome where one is installed; tests that need it skip and say so
where there is none. It runs in a profile of its own and without a network.
"""

import shutil
import subprocess
from pathlib import Path

_NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
# Of every start; who may reach what is said by a rule of its own.
FLAGS = ('--headless', '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
         '--disable-background-networking', '--disable-component-update', '--disable-sync',
         '--disable-dev-shm-usage')
_NO_NETWORK = '--host-resolver-rules=MAP * ~NOTFOUND'
_SECONDS = 180  # a busy machine starts one slowly


def find() -> str | None:
  """Path of a browser, None where there is none."""
  return next((path for name in _NAMES if (path := shutil.which(name))), None)


def dump_dom(browser: str, page: Path, profile: Path) -> str:
  """The document as it is after everything on the page had its time to run."""
  return _run(browser, profile, '--dump-dom', '--virtual-time-budget=5000', page.as_uri())


def screenshot(browser: str, page: Path, picture: Path, profile: Path, width: int = 1200,
               height: int = 1600) -> None:
  """Writes a PNG of the top of a page."""
  _run(browser, profile, f'--screenshot={picture}', f'--window-size={width},{height}',
       '--hide-scrollbars', page.as_uri())


def _run(browser: str, profile: Path, *arguments: str) -> str:
  profile.mkdir(parents=True)
  done = subprocess.run(
      [browser, *FLAGS, _NO_NETWORK, f'--user-data-dir={profile}', *arguments], text=True,
      capture_output=True, timeout=_SECONDS, check=False)
  assert done.returncode == 0, done.stderr[-2000:]
  return done.stdout
