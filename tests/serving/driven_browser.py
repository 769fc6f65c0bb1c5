"""A browser without a window that a test drives: types keys, waits, looks, takes pictures.

Speaks the DevTools protocol over two pipes, so that no library is needed. The browser reaches
nothing but 127.0.0.1. Where one is found: tests/evaluation/browser.py.
"""

import base64
import fcntl
import itertools
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any

from tests.evaluation import browser

_SECONDS = 180  # a busy machine starts one slowly
_KEYS = {'Enter': 13, 'Escape': 27, 'Tab': 9, ' ': 32}
CONTROL = 2


class DrivenBrowser:
  """One page in a browser; a context."""

  def __init__(self, path: str, profile: Path):
    self._numbers = itertools.count(1)
    self._buffer = b''
    commands, self._write = os.pipe()
    self._read, answers = os.pipe()
    high = fcntl.fcntl(answers, fcntl.F_DUPFD, 10)  # so that 3 can be taken first
    os.close(answers)
    self._process = subprocess.Popen(
        ['bash', '-c', 'exec 3<&$1 4>&$2; shift 2; exec "$@"', '_', str(commands), str(high), path,
         *browser.FLAGS, '--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1',
         f'--user-data-dir={profile}', '--remote-debugging-pipe', '--hide-scrollbars',
         'about:blank'], pass_fds=(commands, high), stderr=subprocess.DEVNULL)
    os.close(commands)
    os.close(high)
    targets = self._ask('Target.getTargets')['targetInfos']
    page = next(target['targetId'] for target in targets if target['type'] == 'page')
    self._session = None
    self._session = self._ask('Target.attachToTarget', targetId=page, flatten=True)['sessionId']

  def __enter__(self) -> 'DrivenBrowser':
    return self

  def __exit__(self, *error: object) -> None:
    self._session = None
    try:
      self._ask('Browser.close')
      self._process.wait(timeout=30)
    finally:
      self._process.kill()
      self._process.wait()
      os.close(self._read)
      os.close(self._write)

  def size(self, width: int, height: int, phone: bool = False) -> None:
    """Sets the size of the window, in CSS pixels."""
    self._ask('Emulation.setDeviceMetricsOverride', width=width, height=height,
              deviceScaleFactor=1, mobile=phone)

  def open(self, url: str) -> None:
    self._ask('Page.navigate', url=url)
    self.wait('document.readyState === "complete"')

  def look(self, expression: str) -> Any:
    """The value of a JavaScript expression on the page."""
    found = self._ask('Runtime.evaluate', expression=expression, returnByValue=True)
    assert 'exceptionDetails' not in found, found
    return found['result'].get('value')

  def wait(self, expression: str) -> None:
    """Waits until an expression is true."""
    end = time.monotonic() + _SECONDS
    while not self.look(expression):
      assert time.monotonic() < end, (
          f'never true: {expression}; the page says {self.look("document.body.innerText")}')
      time.sleep(0.05)

  def type(self, text: str) -> None:
    self._ask('Input.insertText', text=text)

  def press(self, key: str, modifiers: int = 0) -> None:
    """Presses and releases a key."""
    common = {'key': key, 'code': key, 'windowsVirtualKeyCode': _KEYS[key], 'modifiers': modifiers}
    text = {'Enter': '\r', ' ': ' '}.get(key)
    self._ask('Input.dispatchKeyEvent', type='keyDown' if text else 'rawKeyDown',
              **common, **({'text': text} if text and not modifiers else {}))
    self._ask('Input.dispatchKeyEvent', type='keyUp', **common)

  def picture(self, path: Path) -> None:
    """Writes what the window shows as PNG."""
    data = self._ask('Page.captureScreenshot', format='png')['data']
    path.write_bytes(base64.b64decode(data))

  def _ask(self, method: str, **parameters: Any) -> dict[str, Any]:
    number = next(self._numbers)
    message = {'id': number, 'method': method, 'params': parameters}
    if getattr(self, '_session', None):
      message['sessionId'] = self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    end = time.monotonic() + _SECONDS
    waiting = select.poll()  # select() takes no descriptor above 1,023
    waiting.register(self._read, select.POLLIN)
    while True:
      while b'\0' not in self._buffer:
        ready = waiting.poll(1000 * max(0, end - time.monotonic()))
        data = os.read(self._read, 1 << 16) if ready else b''
        assert data, f'the browser does not answer {method}'
        self._buffer += data
      line, self._buffer = self._buffer.split(b'\0', 1)
      answer = json.loads(line)
      if answer.get('id') == number:
        assert 'error' not in answer, answer
        return answer['result']
