// The page: sends the form to /v1/completions, shows the text as it comes and what was read.
//
// Texts are put on the page as text nodes only, with what could act on the reader (controls,
// characters that turn the direction of writing) made visible.
'use strict';

const BOTH = '\u0000both';  // no database has this name
const FIELDS = ['max_tokens', 'temperature', 'top_p', 'seed', 'k'];
const byId = (id) => document.getElementById(id);
let running = null;  // AbortController of the requests under way

function visible(text) {
  return text.replace(
      /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]/g,
      (sign) => {
        const code = sign.codePointAt(0);
        if (code < 32) return String.fromCodePoint(0x2400 + code);
        return code === 127 ? '\u2421' : '\\u' + code.toString(16).padStart(4, '0');
      });
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = visible(text);
  return made;
}

function say(text, wrong) {
  byId('status').textContent = visible(text);
  byId('status').className = wrong ? 'error' : '';
}

// Shows spans: prompt in grey, what is copied marked.
function showSpans(box, spans) {
  for (const span of spans) {
    box.append(element(span.copied ? 'mark' : 'span', `of-${span.of}`, span.text));
  }
}

class Pane {
  constructor(heading) {
    this.box = element('section', 'pane');
    this.text = element('div', 'text continuation');
    this.text.setAttribute('aria-live', 'off');
    this.facts = element('p');
    this.read = element('div', 'read');
    this.box.append(element('h2', '', heading), this.text, this.facts, this.read);
    byId('panes').append(this.box);
  }

  add(event) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices[0];
    if (choice.text) this.text.append(visible(choice.text));
    if (choice.finish_reason !== null) {
      this.finish(event);
    } else if (event.retrieval) {
      this.found(event.retrieval);
    }
  }

  // What a chunk found, while the text is still being written.
  found(retrieval) {
    const part = this.section(`chunk ${retrieval.found_by + 1} is complete; the next one reads`);
    for (const neighbor of retrieval.neighbors) part.append(this.neighbor(neighbor));
    this.read.append(part);
  }

  // The end: the same again, with what was copied.
  finish(event) {
    const retrieval = event.retrieval;
    this.text.replaceChildren();
    this.read.replaceChildren();
    showSpans(this.text, retrieval.text_spans);
    let reads = false;
    for (const chunk of retrieval.chunks) {
      if (!chunk.read.length) continue;
      const longest = Math.max(...chunk.read.map((neighbor) => neighbor.longest_copied));
      const part = this.section(
          `chunk ${chunk.number + 1} read ${chunk.read.length} neighbours; longest run in common: ` +
          `${longest} tokens`);
      const box = element('div', 'text');
      showSpans(box, chunk.spans);
      part.append(box);
      for (const neighbor of chunk.read) part.append(this.neighbor(neighbor));
      this.read.append(part);
      reads = true;
    }
    const limited = event.choices[0].finish_reason === 'length';
    const words = [`${event.usage.completion_tokens} tokens` +
                   (limited ? '' : ', where the model ended the text')];
    if (reads) {
      words.push(`${Math.round(100 * retrieval.copied)} % copied from neighbours, at most ` +
                 `${retrieval.longest_copied} tokens in a row`);
    } else {
      words.push('no neighbours read');
    }
    this.facts.textContent = words.join('; ') + '.';
  }

  section(title) {
    const part = element('details');
    part.open = true;
    part.append(element('summary', '', title));
    return part;
  }

  neighbor(neighbor) {
    const box = element('div', 'neighbor');
    const title = neighbor.title || neighbor.document_id;
    // Shorter runs are chance, and are not marked.
    const copied = neighbor.longest_copied >= 3 ?
        `, ${neighbor.longest_copied} tokens in a row copied` : '';
    box.append(element('p', '', `${title}, distance ${neighbor.distance.toFixed(3)}${copied}`));
    const text = element('div', 'text');
    text.tabIndex = 0;  // so that keys can scroll it
    showSpans(text, neighbor.spans || [
      {text: neighbor.text, of: 'text', copied: false},
      {text: neighbor.continuation, of: 'continuation', copied: false}]);
    box.append(text);
    return box;
  }

  fail(words) {
    this.box.append(element('p', 'error', words));
  }
}

// The data of server-sent events, one by one.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let held = '';
  for (;;) {
    const {done, value} = await reader.read();
    if (done) return;
    held += value;
    const parts = held.split('\n\n');
    held = parts.pop();
    for (const part of parts) {
      if (part.startsWith('data: ')) yield part.slice(6);
    }
  }
}

async function complete(pane, fields, signal) {
  const response = await fetch('/v1/completions', {
    method: 'POST', signal, headers: {'content-type': 'application/json'},
    body: JSON.stringify({...fields, stream: true})});
  if (!response.ok) throw new Error((await response.json()).error.message);
  for await (const data of events(response.body)) {
    if (data === '[DONE]') return;
    pane.add(JSON.parse(data));
  }
  throw new Error('the connection ended before the text did');
}

function requests() {
  const common = {prompt: byId('prompt').value};
  for (const name of FIELDS) {
    const value = byId(name).value;
    if (value !== '') common[name] = Number(value);
  }
  const select = byId('database');
  const names = [...select.options].map((option) => option.value);
  const databases = select.value === BOTH ? names.filter((name) => name !== BOTH) :
      names.length ? [select.value] : [];
  const on = byId('retrieval').checked && databases.length > 0;
  if (!on) {
    delete common.k;
    return [['without neighbours', {...common, retrieval: false}]];
  }
  return databases.map((database) => [
    `with neighbours from ${database}`, {...common, retrieval: true, database}]);
}

async function go() {
  if (running) running.abort();
  const mine = running = new AbortController();
  byId('panes').replaceChildren();
  byId('stop').disabled = false;
  say('writing …');
  const ends = await Promise.all(requests().map(async ([heading, fields]) => {
    const pane = new Pane(heading);
    try {
      await complete(pane, fields, mine.signal);
      return true;
    } catch (error) {
      pane.fail(mine.signal.aborted ? 'stopped' : String(error.message));
      return false;
    }
  }));
  if (running !== mine) return;  // another one was started meanwhile
  running = null;
  byId('stop').disabled = true;
  say(ends.every(Boolean) ? 'done' : mine.signal.aborted ? 'stopped' : 'not everything was written',
      !ends.every(Boolean) && !mine.signal.aborted);
}

function stop() {
  if (running) running.abort();
}

async function start() {
  const model = (await (await fetch('/v1/models')).json()).data[0];
  const select = byId('database');
  for (const name of model.databases) select.append(new Option(visible(name), name));
  if (model.databases.length > 1) select.append(new Option('all, side by side', BOTH));
  byId('retrieval').disabled = select.disabled = byId('k').disabled = !model.databases.length;
  byId('retrieval').checked = model.databases.length > 0;
  byId('k').max = byId('k').value = model.max_k || '';
  byId('max_tokens').max = model.max_tokens;
  byId('max_tokens').value = Math.min(96, model.max_tokens);

  // The form's fields may stand in the address: ?prompt=…&seed=1&database=all&go=1
  const given = new URLSearchParams(location.search);
  for (const name of ['prompt', 'database', ...FIELDS]) {
    if (given.has(name)) byId(name).value = given.get(name);
  }
  if (given.get('database') === 'all' && model.databases.length > 1) select.value = BOTH;
  if (given.get('retrieval') === '0') byId('retrieval').checked = false;

  byId('form').addEventListener('submit', (event) => {
    event.preventDefault();
    go();
  });
  byId('stop').addEventListener('click', stop);
  document.addEventListener('keydown', (event) => {
    if (event.key === 'Escape') stop();
    if (event.key === 'Enter' && event.ctrlKey) {
      event.preventDefault();
      if (byId('form').reportValidity()) go();
    }
  });
  if (given.get('go') === '1') go();
}

start().catch((error) => say(`the server does not answer: ${error.message}`, true));
