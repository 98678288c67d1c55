"""Client of an OpenAI-compatible chat endpoint: bounded concurrency, retries with backoff, one line for each failure.

The key is read from the environment, sent in the one header that needs it and masked in whatever is shown.
"""

from __future__ import annotations

import email.utils
import http.client
import ipaddress
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import get_environ_proxies, select_proxy
from urllib3.exceptions import NewConnectionError, ProxyError

from egohod.errors import UserError
from egohod.hod.config import NarratorConfig

log = logging.getLogger(__name__)

# HTTP status codes. 529 is what some services send under overload.
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_UNAVAILABLE = (429, 503, 529)  # overload of the server: no fault of the request, retried without limit
_REFUSED = (401, 403, 404, 405, 407)  # wrong key, model or address: every other request would fail too
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_MAX_BYTES = 4_000_000  # a misdirected endpoint may stream without end
# After so many failures and not one success the settings are wrong, not the requests.
_MAX_FIRST_FAILURES = 5


@dataclass(frozen=True)
class Answer:
    """The answer to one request."""

    text: str | None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    is_cut: bool = False  # the server stopped at max_tokens
    problem: str | None = None  # why there is no text; other requests may have one


class Endpoint:
    """The client; safe to use from several threads."""

    def __init__(
        self,
        settings: NarratorConfig,
        sleep: Callable[[float], Any] | None = None,
        chance: Callable[[], float] = lambda: 0.5,
    ) -> None:
        """``sleep`` and ``chance`` (0 to 1, spreads the waits) are for tests. Raises :class:`UserError`."""
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
        self._chance = chance
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
                    future = Future[Answer]()
                    # A daemon thread, not an executor, which the interpreter joins at exit: an answer may take minutes.
                    work = threading.Thread(target=self._run, args=(future, following[1]), daemon=True)
                    work.start()
                    running[future] = following[0]
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

    def _run(self, future: Future[Answer], body: dict[str, Any]) -> None:
        try:
            future.set_result(self._ask(body))
        except BaseException as error:  # raised again where the future is read
            future.set_exception(error)

    def _ask(self, body: dict[str, Any]) -> Answer:
        """One request with its retries. Raises :class:`UserError` for what every other request would meet too."""
        tries = 0
        while True:
            pause, is_unavailable = 0.0, False
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
                        return answer
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
                    pause, is_unavailable = _retry_after(headers.get("Retry-After")), status in _UNAVAILABLE
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
            backoff = min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT) * (0.5 + self._chance())
            # A server may ask for more patience, not for less.
            pause = max(backoff, min(pause, limit))
            log.info("%s: %s; try %d in %.1f s", self.shown, reason, tries + 1, pause)
            self._sleep(pause)

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and body, all within the time-out."""
        limit = self._settings.timeout_seconds
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
            content = b""
            for piece in response.iter_content(65536):
                content += piece
                # The library's time-out is for each read; a server that trickles would never meet it.
                if time.monotonic() > until:
                    raise requests.ReadTimeout(f"no whole answer within {limit:g} s")
                if len(content) > _MAX_BYTES:
                    raise requests.RequestException("an answer without end")
            return response.status_code, response.headers, content

    def _read(self, content: bytes) -> Answer:
        """The answer in a body with status 200; with a problem where another try would end alike.

        Raises :class:`ValueError` for bodies that are no answer, where another try may succeed.
        """
        try:
            body = json.loads(content)
            choice = body["choices"][0]
            message = choice["message"]
            text = message.get("content")
            finish = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"not an answer of a chat endpoint: {self._clean(content)}{self._proxy_note}") from error
        if isinstance(text, list):  # in parts, of which some hold reasoning or pictures
            parts = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
            text = "".join(part["text"] for part in parts if isinstance(part.get("text"), str))
        if not isinstance(text, str) or not text.strip():
            # No retry: a model refuses again and reasons as long again.
            if message.get("refusal"):
                return Answer(None, problem=f"the model refused: {self._clean(str(message['refusal']))}")
            if finish == "length":
                reasoned = message.get("reasoning_content") or message.get("reasoning")
                why = (
                    "the model used up narrator.max_tokens on its reasoning" if reasoned else "cut off before any text"
                )
                problem = f"an answer without text: {why} (finish_reason is length); raise narrator.max_tokens"
                return Answer(None, problem=problem)
            if finish == "content_filter":
                return Answer(None, problem="an answer without text: the server's content filter removed it")
            raise ValueError(f"an answer without text (finish_reason is {self._clean(str(finish))})")
        usage, tokens = body.get("usage"), []
        for name in ("prompt_tokens", "completion_tokens"):
            # They only go into statistics: whatever is no count is 0.
            try:
                tokens.append(max(0, int(usage[name])))
            except (KeyError, TypeError, ValueError, OverflowError):
                tokens.append(0)
        return Answer(text, tokens[0], tokens[1], is_cut=finish == "length")

    def _clean(self, text: bytes | str) -> str:
        """A short line to show, without the key."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:200] + "..."


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


def _retry_after(value: str | None) -> float:
    """Seconds of a Retry-After header, which holds seconds or a date; 0 without a valid one."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
