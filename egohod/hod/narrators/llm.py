"""Narrations by a language model (kind llm) or a vision-language model that also gets the frames (kind vlm).

:class:`Endpoint` is the client of any OpenAI-compatible chat server: bounded concurrency, retries with backoff, one
line for each failure. The key is read from the environment, sent in the one header that needs it and masked in whatever
is shown. :class:`ChatFormat` makes the requests and validates the answers; :class:`LanguageModelNarrator` sends them to
an endpoint, :mod:`egohod.hod.narrators.batch` has them in files.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import io
import ipaddress
import json
import logging
import os
import re
import threading
import time
import unicodedata
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import jinja2
import jsonschema
import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import InvalidHeader, NewConnectionError, ProxyError
from urllib3.util import Retry

from egohod.errors import UserError
from egohod.hod.config import FURTHER_CAPTIONS, NarratorConfig
from egohod.hod.narrators import FURTHER_PROMPTS, Narration, Request, Usage, describe, prompt_path

log = logging.getLogger(__name__)

Result = TypeVar("Result")

# --- The client ---

# HTTP status codes. 529 is what some services send under overload.
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_UNAVAILABLE = (429, 503, 529)  # overload of the server: no fault of the request, retried without limit
_REFUSED = (401, 403, 404, 405, 407)  # wrong key, model or address: every other request would fail too
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
MAX_BYTES = 4_000_000  # of an answer; a misdirected endpoint may stream without end
# After so many failures and not one success the settings are wrong, not the requests.
_MAX_FIRST_FAILURES = 5


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    text: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cut: bool = False  # the server stopped at max_tokens
    seconds: float = 0.0  # from the request to its answer, without the waits between tries
    problem: str | None = None  # why there is no text; other requests may have one


class Endpoint:
    """The client; safe to use from several threads."""

    def __init__(self, settings: NarratorConfig, sleep: Callable[[float], Any] | None = None) -> None:
        """``sleep`` is for tests. Raises :class:`UserError`."""
        parts = urlsplit(settings.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(
                f"narrator.endpoint is '{settings.endpoint}', but must be an address such as http://host:8000/v1"
            )
        if parts.username or parts.password:
            raise UserError(
                "narrator.endpoint must not hold a key or password; name its variable in narrator.api_key_env"
            )
        self._settings = settings
        self._url = urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))
        self.shown = urlunsplit(parts._replace(query=""))
        # Keys that are stored in files end in a line break.
        self._key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not self._key:
            raise UserError(f"narrator.api_key_env names {settings.api_key_env}, which is not set; export it")
        # Such a key would fail inside http.client, with the key in the traceback.
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"{settings.api_key_env}: holds characters that no key has; export it anew")
        self._stop = threading.Event()
        self._sleep = sleep or self._stop.wait
        self._session = requests.Session()
        self._session.mount(f"{parts.scheme}://", HTTPAdapter(pool_maxsize=settings.concurrency))
        # No proxy can reach the loopback address of this machine, and many machines set http_proxy without no_proxy.
        self._proxies = {"no_proxy": parts.hostname} if _is_loopback(parts.hostname) else {}
        self._proxy_note = _proxy_note(self._url, self._proxies.get("no_proxy"))
        self._last_success = self._left = time.monotonic()
        self._proven, self._failures = False, 0

    def ask_all(self, bodies: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Answer]]:
        """Send all requests, at most ``concurrency`` at a time; yields (number, answer) as they come.

        Raises :class:`UserError`, after the answers that there are, when no request has succeeded for
        ``give_up_seconds``, when the server refuses the key, model or address, or when the first requests all fail.
        """
        self._stop.clear()
        # The caller's time between two calls is not the server's.
        self._last_success += time.monotonic() - self._left
        todo, running = iter(enumerate(bodies)), dict[Future[Answer], int]()
        fault: UserError | None = None

        try:
            while True:
                while fault is None and len(running) < self._settings.concurrency:
                    following = next(todo, None)
                    if following is None:
                        break
                    number, body = following
                    running[_in_thread(self._ask, body)] = number
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    try:
                        answer = future.result()
                    except UserError as error:
                        fault = fault or error
                        self._stop.set()  # ends the waits of the other threads
                        continue
                    if answer.problem is None:
                        self._proven = True
                    else:
                        self._failures += 1
                        if not self._proven and self._failures >= _MAX_FIRST_FAILURES:
                            fault = fault or UserError(f"{self.shown}: no request has succeeded; {answer.problem}")
                            self._stop.set()
                    yield number, answer
        finally:
            self._stop.set()
            self._left = time.monotonic()
        if fault is not None:
            raise fault

    def _ask(self, body: dict[str, Any]) -> Answer:
        """One request with its retries. Raises :class:`UserError` for what every other request would meet too."""
        tries = 0
        while True:
            pause, is_unavailable, began = 0.0, False, time.monotonic()
            try:
                status, headers, content = self._post(body)
            except requests.RequestException as error:
                is_unavailable = _is_unreachable(error)
                reason = self._clean(_reason(error)) + self._proxy_note
            else:
                if status == 200:
                    try:
                        answer = self._read(content)
                        if answer.problem is None:
                            self._last_success = time.monotonic()
                        return replace(answer, seconds=time.monotonic() - began)
                    except ValueError as error:  # retried: the next answer may be whole
                        reason = str(error)
                        self._last_success = time.monotonic()
                else:
                    reason = f"HTTP {status}: {self._clean(content)}{self._proxy_note}"
                    if status in _REFUSED:
                        raise UserError(f"{self.shown}: {reason}; see narrator.endpoint, model and api_key_env")
                    if status not in _RETRIED:
                        self._last_success = time.monotonic()
                        return Answer(None, problem=reason)
                    is_unavailable = status in _UNAVAILABLE
                    with contextlib.suppress(InvalidHeader):  # seconds or a date
                        pause = Retry().parse_retry_after(headers.get("Retry-After", "0"))
            limit = self._settings.give_up_seconds
            if time.monotonic() - self._last_success > limit or self._stop.is_set():
                raise UserError(
                    f"{self.shown}: no request has succeeded for {limit:g} s ({reason}); finished clips are saved, "
                    "rerun to resume"
                )
            tries += 1
            # A server that is away or overloaded is no fault of this request: only time ends that. A connection that
            # breaks off may well be: a prompt can be what a server crashes at, or never completes.
            if tries > self._settings.retries and not is_unavailable:
                return Answer(None, problem=f"{reason} ({tries} tries)")
            # A server may ask for more patience, not for less.
            pause = max(min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT), min(pause, limit))
            log.info("%s: %s; try %d in %.1f s", self.shown, reason, tries + 1, pause)
            self._sleep(pause)

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and body. Raises :class:`requests.ReadTimeout` if they are not complete in time."""
        limit = self._settings.timeout_seconds
        # The library's time-out is for each read: a server that sends a byte now and then would never meet it, be it of
        # the headers or the body. The thread that waits for such a server is left to itself.
        try:
            return _in_thread(self._exchange, body, limit).result(limit)
        except TimeoutError as error:
            raise requests.ReadTimeout(f"no whole answer within {limit:g} s") from error

    def _exchange(self, body: dict[str, Any], limit: float) -> tuple[int, Any, bytes]:
        until = time.monotonic() + limit

        def sign(request: requests.PreparedRequest) -> requests.PreparedRequest:
            if self._key:
                request.headers["Authorization"] = f"Bearer {self._key}"
            return request

        with self._session.post(
            self._url,
            json=body,
            auth=sign,  # instead of a header: without auth, requests looks for a password in ~/.netrc
            timeout=(min(10.0, limit), limit),
            proxies=self._proxies,
            allow_redirects=False,  # a redirect could send the key elsewhere
            stream=True,
        ) as response:
            content = bytearray()
            # Small pieces: each is awaited as a whole, and the time is looked at in between.
            for piece in response.iter_content(1024):
                content += piece
                if time.monotonic() > until:
                    raise requests.ReadTimeout(f"no whole answer within {limit:g} s")
                if len(content) > MAX_BYTES:
                    raise requests.RequestException(f"an answer of more than {MAX_BYTES / 1e6:g} MB")
            return response.status_code, response.headers, bytes(content)

    def _read(self, content: bytes) -> Answer:
        """The answer in a body with status 200, see :func:`read_chat`."""
        try:
            body = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{_NO_CHAT}: {self._clean(content)}{self._proxy_note}") from error
        try:
            return read_chat(body, self._clean)
        except ValueError as error:
            raise ValueError(f"{error}{self._proxy_note}") from error

    def _clean(self, text: bytes | str) -> str:
        """A short line to show, without the key."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return shown(text.replace(self._key, "***") if self._key else text)


_NO_CHAT = "not an answer of a chat endpoint"


def read_chat(body: Any, clean: Callable[[str], str]) -> Answer:
    """The answer in the parsed body of a chat completion; with a problem where another try would end alike.

    ``clean`` makes what is repeated in messages fit to show. Raises :class:`ValueError` for bodies that are no answer,
    where another try may succeed.
    """
    try:
        choice = body["choices"][0]
        message = choice["message"]
        text = message.get("content")
        finish = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{_NO_CHAT}: {clean(spelled(body))}") from error
    if isinstance(text, list):  # in parts, of which some hold reasoning or pictures
        parts = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
        text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
    if not isinstance(text, str) or not text.strip():
        # No retry: a model refuses again and reasons as long again.
        if message.get("refusal"):
            return Answer(None, problem=f"the model refused: {clean(spelled(message['refusal']))}")
        if finish == "length":
            reasoned = message.get("reasoning_content") or message.get("reasoning")
            why = "the model used up narrator.max_tokens on its reasoning" if reasoned else "cut off before any text"
            problem = f"an answer without text: {why} (finish_reason is length); raise narrator.max_tokens"
            return Answer(None, problem=problem)
        if finish == "content_filter":
            return Answer(None, problem="an answer without text: the server's content filter removed it")
        raise ValueError(f"an answer without text (finish_reason is {clean(spelled(finish))})")
    usage, tokens = body.get("usage"), []
    for name in ("prompt_tokens", "completion_tokens"):
        # They only go into statistics: whatever is no count is 0.
        try:
            tokens.append(max(0, int(usage[name])))
        except (KeyError, TypeError, ValueError, OverflowError):
            tokens.append(0)
    return Answer(text, tokens[0], tokens[1], is_cut=finish == "length")


def spelled(value: Any) -> str:
    """A value of parsed JSON as text."""
    try:
        return value if isinstance(value, str) else json.dumps(value)
    except RecursionError:  # what is nested nearly too deep to be read is too deep to be written
        return "(deeply nested)"


def shown(text: str) -> str:
    """The beginning of a text that a server sent, on one line."""
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + "..."


def _in_thread(function: Callable[..., Result], *arguments: Any) -> Future[Result]:
    """What a function returns or raises, called in a thread of its own.

    A daemon thread, not an executor, which the interpreter joins at exit: an answer may take minutes.
    """
    future = Future[Result]()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised again where the future is read
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    # Servers print http://0.0.0.0:8000 when they listen on all addresses; as a target it is this machine.
    return address.is_loopback or address.is_unspecified


def _proxy_note(url: str, no_proxy: str | None) -> str:
    """The end of an error message: the proxy that requests to ``url`` take, without its password, and the way around.

    Without it an answer of the proxy looks like one of the server.
    """
    proxy = select_proxy(url, get_environ_proxies(url, no_proxy))
    if not proxy:
        return ""
    parts = urlsplit(url)
    # Lower case first, as in urllib's own lookup.
    names = [f"{parts.scheme}_proxy", "all_proxy"]
    variables = [each for name in names for each in (name, name.upper()) if os.environ.get(each)]
    where = f"that {variables[0]} names" if variables else "of the system's settings"
    address = proxy.rpartition("@")[2].rpartition("://")[2].rstrip("/")
    return f"; sent through the proxy {address} {where} (no_proxy={parts.hostname} would go without it)"


def _is_unreachable(error: requests.RequestException) -> bool:
    """Whether there was no connection at all."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(reason, ProxyError):
        reason = reason.original_error
    return isinstance(error, requests.ConnectTimeout) or isinstance(reason, NewConnectionError)


def _reason(error: BaseException) -> str:
    """The system's reason, without the three layers that requests and urllib3 wrap around it."""
    if isinstance(error, requests.Timeout):
        return "no connection in time" if isinstance(error, requests.ConnectTimeout) else "no answer in time"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, http.client.RemoteDisconnected):
            return "the connection broke off"
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror[0].lower() + cause.strerror[1:]
        cause = cause.__cause__ or cause.__context__
    return f"{type(error).__name__}: {error}"


# --- The narrator ---


def answer_schema(captions: Sequence[str] = ("fine",)) -> dict[str, Any]:
    """The JSON schema of an answer with these captions of each clip, by the names of ``narrator.captions``.

    Sent to the server and checked on its answer: few servers enforce it completely.
    """
    properties: dict[str, Any] = {"clip": {"type": "integer"}, "caption": {"type": "string", "minLength": 1}}
    # An opposite may be none: not every motion has a reverse.
    further = {"coarse": {"type": "string"}, "opposite": {"type": ["string", "null"]}}
    properties |= {name: kind for name, kind in further.items() if name in captions}
    # All are required: services whose schemas are strict know no optional property.
    item = {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}
    return {
        "type": "object",
        "properties": {"captions": {"type": "array", "items": item}},
        "required": ["captions"],
        "additionalProperties": False,
    }


_BLOCKS = ("instructions", "examples", "request")
# How reasoning models mark their reasoning, unless the server strips it.
_REASONING = re.compile(r"<(/?)(?:think|thinking|thought|reasoning|analysis)>", re.IGNORECASE)
_ANSWER = re.compile(r'\{\s*"captions"\s*:')
_MAX_CANDIDATES = 8  # each costs a parse of the rest of the text: thousands of braces would take minutes
_MAX_ITEMS = 10  # for each clip; a model in a loop writes a hundred thousand, which take minutes to validate


class ChatFormat:
    """The bodies of chat requests for captions, and the captions in their answers."""

    def __init__(self, settings: NarratorConfig, prompt: Path | None = None) -> None:
        """``prompt`` is a Jinja file with the blocks ``instructions``, ``examples`` and ``request``.

        Raises :class:`UserError` naming the file or the key at fault.
        """
        self.name = settings.kind
        self._settings = settings
        self._schema = answer_schema(settings.captions)
        # Once: to prepare one takes longer than to validate an answer.
        self._validator = jsonschema.Draft202012Validator(self._schema)
        self._names = ["caption", *(name for name in FURTHER_CAPTIONS if name in settings.captions)]
        self._prompt = read_prompt(prompt or prompt_path(settings), _BLOCKS)
        prompts = [path for name, path in FURTHER_PROMPTS.items() if name in settings.captions]
        every = [self._prompt, *(read_prompt(path, _BLOCKS[:2]) for path in prompts)]
        # Rendered once, and first in every request: servers cache the prefix that requests have in common.
        more = {"captions": settings.captions}
        texts = [render_prompt(each, block, more) for each in every for block in _BLOCKS[:2]]
        self.instructions, self.system = "\n\n".join(texts[::2]), "\n\n".join(texts)

    def batches(self, count: int) -> list[range]:
        """The places of ``count`` clips, by request."""
        size = self._settings.batch
        return [range(first, min(first + size, count)) for first in range(0, count, size)]

    def body(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The JSON body of a chat request for a batch of clips, which are numbered from 1."""
        settings = self._settings
        # Prompts write narrations as JSON strings: such text is data and cannot end its own quotation.
        clips = [
            {
                "clip": number,
                "narration": request.source,
                "facts": describe(request.facts, settings.distances),
                "refused": request.refused,
                "complaints": list(request.complaints),
            }
            for number, request in enumerate(requests, 1)
        ]
        text = render_prompt(self._prompt, "request", {"clips": clips})
        content: str | list[dict[str, Any]] = text
        if settings.kind == "vlm":
            content = [{"type": "text", "text": text}]
            for number, request in enumerate(requests, 1):
                frames = request.frames
                if frames is None or not len(frames):
                    raise UserError("narrator.kind=vlm needs the frames of each clip")
                content.append({"type": "text", "text": f"Frames of clip {number}:"})
                for at in np.linspace(0, len(frames) - 1, min(settings.frames, len(frames))).round():
                    image = Image.fromarray(frames[int(at)])
                    image.thumbnail((settings.frame_size, settings.frame_size))
                    buffer = io.BytesIO()
                    image.save(buffer, "JPEG", quality=settings.jpeg_quality)
                    url = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
                    content.append({"type": "image_url", "image_url": {"url": url}})
        body: dict[str, Any] = {
            "messages": [{"role": "system", "content": self.system}, {"role": "user", "content": content}],
            "temperature": settings.temperature,
            "max_tokens": settings.max_tokens * len(requests) * len(settings.captions),
            "seed": settings.seed + requests[0].seed,
        }
        if settings.model:
            body["model"] = settings.model
        return body | response_format(settings.answer_format, "captions", self._schema)

    def narrations(self, answer: Answer, count: int) -> list[Narration]:
        """One narration for each clip of the batch."""
        if answer.text is None:
            return [Narration(None, self.name, problem=f"no answer: {answer.problem}")] * count
        items, problem = _captions(answer.text, self._validator, self._names, count)
        if problem and answer.is_cut:
            problem += "; cut off at its limit of tokens, raise narrator.max_tokens"
        wrong = f"schema: {problem}" if problem else "schema: the answer leaves this clip out, or has it twice"
        narrations = []
        for place in range(count):
            # A request's tokens are shared out over its clips so that the sum stays.
            tokens = [
                total // count + (place < total % count) for total in (answer.prompt_tokens, answer.completion_tokens)
            ]
            item = items.get(place + 1, {})
            problem = None if item.get("caption") else wrong
            own = item.get("caption"), self.name, tokens[0], tokens[1], problem
            narrations.append(Narration(*own, opposite=item.get("opposite"), coarse=item.get("coarse")))
        return narrations


class LanguageModelNarrator:
    """Captions several clips with each request to an endpoint."""

    def __init__(self, settings: NarratorConfig, prompt: Path | None = None, endpoint: Endpoint | None = None) -> None:
        """See :class:`ChatFormat`."""
        self.name = settings.kind
        self._format = ChatFormat(settings, prompt)
        self.instructions = self._format.instructions
        self._endpoint = endpoint or Endpoint(settings)
        # Of the last requests, for the estimate of a dry run.
        self.usage = deque[Usage](maxlen=1000)

    def narrate(self, requests: Sequence[Request]) -> Iterator[tuple[int, Narration]]:
        """See :class:`~egohod.hod.narrators.Narrator`. A batch without usable answer has no texts."""
        batches = self._format.batches(len(requests))
        # A generator: the frames of a batch are encoded when it is sent, not all at once.
        bodies = (self._format.body([requests[number] for number in batch]) for batch in batches)
        for place, answer in self._endpoint.ask_all(bodies):
            batch = batches[place]
            if answer.text is not None:
                self.usage.append(Usage(len(batch), answer.seconds, answer.prompt_tokens, answer.completion_tokens))
            yield from zip(batch, self._format.narrations(answer, len(batch)), strict=True)


def response_format(answer_format: str, name: str, schema: dict[str, Any]) -> dict[str, Any]:
    """What a request says about the schema of its answer: servers disagree on where that is."""
    named = {"name": name, "strict": True, "schema": schema}
    formats: dict[str, dict[str, Any]] = {
        "json_schema": {"response_format": {"type": "json_schema", "json_schema": named}},
        "json_object_schema": {"response_format": {"type": "json_object", "schema": schema}},
        "structured_outputs": {"structured_outputs": {"json": schema}},
        "guided_json": {"guided_json": schema},
        "json_object": {"response_format": {"type": "json_object"}},
        "none": {},
    }
    return formats[answer_format]


def read_prompt(path: Path, blocks: Sequence[str]) -> jinja2.Template:
    """The prompt in a file, which must have these blocks. Raises :class:`UserError`."""
    try:
        source = path.read_text(encoding="utf-8-sig")
        prompt = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False).from_string(source)
    except (OSError, ValueError, RecursionError, jinja2.TemplateError) as error:
        raise UserError(f"{path}: not usable as a prompt: {error}") from error
    missing = [block for block in blocks if block not in prompt.blocks]
    if missing:
        raise UserError(f"{path}: a prompt needs the blocks {', '.join(blocks)}; there is no {missing[0]}")
    prompt.filename = str(path)
    return prompt


def render_prompt(prompt: jinja2.Template, block: str, values: dict[str, Any]) -> str:
    """A block of a prompt with these values. Raises :class:`UserError` where that fails."""
    context = prompt.new_context({"clips": [], **values})
    try:
        return "".join(prompt.blocks[block](context)).strip()
    except Exception as error:  # whatever the expressions of a user's prompt raise
        raise UserError(f"{prompt.filename}: {type(error).__name__}: {error}") from error


def without_reasoning(text: str) -> str:
    """The part of a model's text that follows its reasoning, which may be nothing."""
    # Some chat templates open the reasoning in the prompt, so that only its end is here; reasoning without an end is no
    # answer, whatever drafts are in it.
    marks = list(_REASONING.finditer(text))
    closing = [mark.end() for mark in marks if mark.group(1)]
    start = closing[-1] if closing else 0
    unclosed = [mark.start() for mark in marks if mark.start() >= start]
    return text[start : unclosed[0] if unclosed else None]


def _captions(
    text: str, validator: jsonschema.Draft202012Validator, names: Sequence[str], count: int
) -> tuple[dict[int, dict[str, str | None]], str | None]:
    """The captions ``names`` of each of ``count`` clips, and the problem of the answer as a whole."""
    text = without_reasoning(text)
    if not text.strip():
        return {}, "nothing follows the model's reasoning"
    valid, problem = None, None
    # The last valid one: before it a model may quote the request, draft and talk in braces.
    for begin in reversed(list(_ANSWER.finditer(text))[-_MAX_CANDIDATES:]):
        try:
            answer, _ = json.JSONDecoder().raw_decode(text, begin.start())
            captions = answer.get("captions")
            # Before all else, which takes longer for each.
            if isinstance(captions, list) and len(captions) > _MAX_ITEMS * count:
                problem = problem or f"{len(captions):,} captions for {count} clips"
                continue
            # Small models write the clip's number as text.
            for item in captions if isinstance(captions, list) else ():
                number = item.get("clip") if isinstance(item, dict) else None
                if isinstance(number, str) and re.fullmatch(r"\s*[0-9]{1,9}\s*", number):
                    item["clip"] = int(number)
                # Left out, or of another type, they are none: the captions are as good.
                if isinstance(item, dict):
                    for name, none in (("coarse", ""), ("opposite", None)):
                        if name in names:
                            item[name] = item[name] if isinstance(item.get(name), str) else none
            validator.validate(answer)
            valid = answer
            break
        except (ValueError, RecursionError) as error:
            problem = problem or f"not JSON ({' '.join(str(error).split())[:80]})"
        except jsonschema.ValidationError as error:
            problem = problem or f"{error.json_path}: {error.validator} is not met"
    if valid is None:
        return {}, problem or "not JSON of the form {captions: [...]}"
    numbers = Counter(item["clip"] for item in valid["captions"])
    # A clip with two captions is ambiguous.
    once = [item for item in valid["captions"] if numbers[item["clip"]] == 1]
    return {item["clip"]: {name: _one_line(item[name]) for name in names} for item in once}, None


def _one_line(text: str | None) -> str | None:
    """A text on one line, without control characters and surrogates, which no UTF-8 file can hold; None if empty."""
    printable = "".join(c for c in text or "" if c.isspace() or unicodedata.category(c) not in ("Cc", "Cs"))
    return " ".join(printable.split()) or None
