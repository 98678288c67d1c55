"""An OpenAI-compatible chat endpoint: requests that are tried again, and never more in flight than allowed.

The key is read from the environment, sent in the one header it belongs in and cut out of whatever is shown.
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

from egohod.hod.config import NarratorSettings
from egohod.hod.narrators.base import EndpointDown, NarratorError

log = logging.getLogger(__name__)

_BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_AWAY = (429, 503, 529)
_REFUSED = (401, 403, 404, 405, 407)
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0
_MOST_BYTES = 4_000_000
# So many requests that fail before the first one works: the settings are wrong, not the requests.
_HOPELESS = 5


class Unanswerable(Exception):
    """This request has no answer; others may have one."""


@dataclass(frozen=True)
class Answer:
    """What came back."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    is_cut: bool = False
    """The server stopped at ``max_tokens``."""


class Endpoint:
    """Asks; safe to use from several threads."""

    def __init__(
        self,
        settings: NarratorSettings,
        sleep: Callable[[float], None] | None = None,
        chance: Callable[[], float] = lambda: 0.5,
    ) -> None:
        """``sleep`` and ``chance`` (0 to 1, spreads the waits) are for tests. Raises :class:`NarratorError`."""
        parts = urlsplit(settings.endpoint)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise NarratorError(
                f"narrator.endpoint is '{settings.endpoint}', but must be an address such as http://host:8000/v1"
            )
        if parts.username or parts.password:
            raise NarratorError(
                "narrator.endpoint must not hold a key or password; name its variable in narrator.api_key_env"
            )
        self._settings = settings
        self._url = urlunsplit(parts._replace(path=parts.path.rstrip("/") + "/chat/completions"))
        self.shown = urlunsplit(parts._replace(query=""))
        # Keys that are kept in files end in a line break.
        self._key = os.environ.get(settings.api_key_env, "").strip() if settings.api_key_env else ""
        if settings.api_key_env and not self._key:
            raise NarratorError(f"narrator.api_key_env names {settings.api_key_env}, which is not set; export it")
        if not (self._key.isascii() and self._key.isprintable()):
            raise NarratorError(f"{settings.api_key_env}: holds characters that no key has; export it anew")
        self._stop = threading.Event()
        self._sleep = sleep or self._wait
        self._chance = chance
        self._session = requests.Session()
        self._session.mount(f"{parts.scheme}://", HTTPAdapter(pool_maxsize=settings.concurrency))
        # No proxy can reach the loopback address of this machine, and many machines set http_proxy without no_proxy.
        self._proxies = {"no_proxy": parts.hostname} if _is_loopback(parts.hostname) else {}
        self._through = _proxy_note(self._url, self._proxies.get("no_proxy"))
        self._worked = self._left = time.monotonic()
        self._proven, self._failed = False, 0

    def ask_all(self, bodies: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Answer | Unanswerable]]:
        """Ask all, at most ``concurrency`` at a time; yields (number, answer) as they come.

        Raises :class:`EndpointDown` when nothing has worked for ``give_up_seconds`` and :class:`NarratorError` when the
        server refuses the key, model or address or fails the first requests one and all; after the answers there are.
        """
        self._stop.clear()
        # The time between two calls is not the server's.
        self._worked += time.monotonic() - self._left
        todo, running = iter(enumerate(bodies)), dict[Future[Answer], int]()
        fault: BaseException | None = None
        try:
            while True:
                while fault is None and len(running) < self._settings.concurrency:
                    nextup = next(todo, None)
                    if nextup is None:
                        break
                    running[self._begin(nextup[1])] = nextup[0]
                if not running:
                    break
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    try:
                        answer = future.result()
                        self._proven = True
                        yield number, answer
                    except Unanswerable as error:
                        self._failed += 1
                        if not self._proven and self._failed >= _HOPELESS:
                            fault = fault or NarratorError(f"{self.shown}: no request has worked; {error}")
                            self._stop.set()
                        yield number, error
                    except NarratorError as error:
                        fault = fault or error
                        self._stop.set()  # nobody waits for what will not come
        finally:
            self._stop.set()
            self._left = time.monotonic()
        if fault is not None:
            raise fault

    def _begin(self, body: dict[str, Any]) -> Future[Answer]:
        """Ask in a thread that does not keep the program from ending: an answer may be minutes away."""
        future = Future[Answer]()

        def work() -> None:
            try:
                future.set_result(self.ask(body))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=work, name="narrator", daemon=True).start()
        return future

    def ask(self, body: dict[str, Any]) -> Answer:
        """One request with its retries. Raises as :meth:`ask_all`, and :class:`Unanswerable` for this one alone."""
        tries = 0
        while True:
            pause, away = None, False
            try:
                status, headers, content = self._post(body)
                if status == 200:
                    answer = self._read(content)
                    self._worked = time.monotonic()
                    return answer
                said = f"HTTP {status}: {self._clean(content)}{self._through}"
                if status in _REFUSED:
                    raise NarratorError(f"{self.shown}: {said}; see narrator.endpoint, model and api_key_env")
                if status not in _BUSY:
                    self._worked = time.monotonic()
                    raise Unanswerable(said)
                pause, away = _retry_after(headers.get("Retry-After")), status in _AWAY
            except requests.RequestException as error:
                away = _unreached(error)
                said = self._clean(_why(error)) + self._through
            except _Malformed as error:
                said = str(error)
                self._worked = time.monotonic()
            if time.monotonic() - self._worked > self._settings.give_up_seconds or self._stop.is_set():
                raise EndpointDown(
                    f"{self.shown}: nothing has worked for {self._settings.give_up_seconds:g} s ({said}); what is done "
                    "is kept, the same command goes on from there"
                )
            tries += 1
            # A server that is away or asks for patience is no fault of this request: only time ends that. A connection
            # that breaks off may well be: a prompt can be what a server crashes at, or never gets done with.
            if tries > self._settings.retries and not away:
                raise Unanswerable(f"{said} ({tries} tries)")
            backoff = min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT) * (0.5 + self._chance())
            # A server may ask for more patience, not for less.
            pause = max(backoff, min(pause or 0.0, self._settings.give_up_seconds))
            log.info("%s: %s; try %d in %.1f s", self.shown, said, tries + 1, pause)
            self._sleep(pause)

    def _post(self, body: dict[str, Any]) -> tuple[int, Any, bytes]:
        """Status, headers and body, all within the time-out."""
        until = time.monotonic() + self._settings.timeout_seconds
        with self._session.post(
            self._url,
            json=body,
            auth=self._sign,
            timeout=(min(10.0, self._settings.timeout_seconds), self._settings.timeout_seconds),
            proxies=self._proxies,
            allow_redirects=False,
            stream=True,
        ) as response:
            content = b""
            for piece in response.iter_content(65536):
                content += piece
                # The library's time-out is for each read; a server that trickles would never meet it.
                if time.monotonic() > until:
                    raise requests.ReadTimeout(f"no whole answer within {self._settings.timeout_seconds:g} s")
                if len(content) > _MOST_BYTES:
                    raise requests.RequestException("an answer without end")
            return response.status_code, response.headers, content

    def _sign(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        # As ``auth``, so that no password file of the machine is looked at instead.
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _read(self, content: bytes) -> Answer:
        try:
            answer = json.loads(content)
            choice = answer["choices"][0]
            message = choice["message"]
            text = _text(message.get("content"))
            finish = choice.get("finish_reason")
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
            raise _Malformed(f"not an answer of a chat endpoint: {self._clean(content)}{self._through}") from error
        if not text.strip():
            # Asked again, a model refuses again and thinks as long again.
            if message.get("refusal"):
                raise Unanswerable(f"the model refused: {self._clean(str(message['refusal']))}")
            if finish == "length":
                thought = message.get("reasoning_content") or message.get("reasoning")
                used = (
                    "the model used up narrator.max_tokens on its reasoning" if thought else "cut off before any text"
                )
                raise Unanswerable(
                    f"an answer without text: {used} (finish_reason is length); raise narrator.max_tokens"
                )
            if finish == "content_filter":
                raise Unanswerable("an answer without text: the server's content filter removed it")
            raise _Malformed(f"an answer without text (finish_reason is {self._clean(str(finish))})")
        usage = answer.get("usage")
        usage = usage if isinstance(usage, dict) else {}
        prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
        return Answer(text, prompt, completion, is_cut=finish == "length")

    def _clean(self, text: bytes | str) -> str:
        """A line to show, without the key."""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if self._key:
            text = text.replace(self._key, "***")
        text = " ".join(text.split())
        return text if len(text) <= 200 else text[:200] + "..."

    def _wait(self, seconds: float) -> None:
        self._stop.wait(seconds)


class _Malformed(Exception):
    """An answer that is none; another try may do better."""


def _text(content: Any) -> str:
    """The text of a message: as such, in parts of which some may hold reasoning or pictures, or none at all."""
    if isinstance(content, list):
        parts = [each for each in content if isinstance(each, dict) and each.get("type") == "text"]
        return "".join(each["text"] for each in parts if isinstance(each.get("text"), str))
    return content if isinstance(content, str) else ""


def _count(value: Any) -> int:
    """A number of tokens; 0 where the server gives none. It only goes into statistics."""
    try:
        return max(0, int(value))
    except (TypeError, ValueError, OverflowError):
        return 0


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
    """The end of an error message: which proxy requests to ``url`` take, without its password, and the way around."""
    proxy = select_proxy(url, get_environ_proxies(url, no_proxy))
    if not proxy:
        return ""
    parts = urlsplit(url)
    names = [f"{parts.scheme}_proxy", "all_proxy"]
    variables = [each for name in names for each in (name, name.upper()) if os.environ.get(each)]
    where = f"that {variables[0]} names" if variables else "of the system's settings"
    address = proxy.rpartition("@")[2].rpartition("://")[2].rstrip("/")
    return f"; sent through the proxy {address} {where} (no_proxy={parts.hostname} would go without it)"


def _unreached(error: requests.RequestException) -> bool:
    """Whether there was no connection at all."""
    reason = getattr(error.args[0], "reason", None) if error.args else None
    if isinstance(reason, ProxyError):
        reason = reason.original_error
    return isinstance(error, requests.ConnectTimeout) or isinstance(reason, NewConnectionError)


def _why(error: BaseException) -> str:
    """What the system said, without the libraries' wrapping."""
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


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    if value is None:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return None
