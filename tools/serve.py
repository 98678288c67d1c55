"""Search, watch and mark moments of your own videos in a browser.

    python tools/serve.py features
    python tools/serve.py features_a features_b            two checkpoints beside each other
    python tools/serve.py features --hod hod.csv           also hands, objects and narrations of the HOD pipeline
    python tools/serve.py features --host 0.0.0.0          for other machines, which need the printed token

The folders are those of tools/extract_features.py. Open the printed address in any browser: type a sentence or take a
moment as the query, press ? for the keys. Marks go to marks.json in the first folder; the page exports them as csv for
main_finetune.py and main_eval.py. Nothing is fetched from elsewhere. Ctrl-C ends the server.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from _common import run_tool, tool_parser

from egohod import cli
from egohod.errors import UserError

log = logging.getLogger("serve")


def main(arguments: Sequence[str]) -> int:
    parser = tool_parser(__doc__)
    add = parser.add_argument
    add("index", nargs="+", type=Path, metavar="FOLDER", help="--output of tools/extract_features.py, one or two")
    add("--videos", metavar="FOLDER", help="folder of the videos if they were moved")
    add("--checkpoint", action="append", metavar="PATH", help="the checkpoint if it was moved, once for each folder")
    add("--hod", type=Path, metavar="CSV", help="--output of tools/generate_hod.py for these videos")
    add("--marks", type=Path, metavar="JSON", help="file of the marks (default: marks.json in the first folder)")
    add("--host", default="127.0.0.1", help="address to listen on (default: this machine only)")
    add("--port", type=int, default=7860, help="0 takes a free one (default: 7860)")
    token = "of a server for other machines (default: $EGOHOD_TOKEN, else a random one, which is printed)"
    add("--token", default=os.environ.get("EGOHOD_TOKEN", ""), help=token)
    add("--idle", type=float, default=0.0, metavar="SECONDS", help="stop when no request came for so long")
    args = parser.parse_args(arguments)
    checkpoints = args.checkpoint or [None] * len(args.index)
    if len(args.index) > 2:
        raise UserError(f"one folder or two can be shown, not {len(args.index)}")
    if len(checkpoints) != len(args.index):
        raise UserError(f"--checkpoint is given {len(checkpoints)} times for {len(args.index)} folders")
    if not 0 <= args.port < 65536 or args.idle < 0:
        raise UserError(f"--port must be 0 to 65535 and --idle at least 0, not {args.port} and {args.idle:g}")
    try:
        from egohod.serve.app import Access, create_app, is_loopback, open_socket, run
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("egohod"):
            raise
        raise UserError(f"no {error.name}: pip install fastapi uvicorn (the extra [serve] of egohod)") from error
    from egohod.serve.index import MARKS_FILE, Library, Marks, Tracks

    # First: a port that is taken should not cost the seconds of loading a model.
    listening = open_socket(args.host, args.port)
    marks = Marks(args.marks or args.index[0] / MARKS_FILE)
    tracks = Tracks(args.hod) if args.hod else None
    libraries = [
        Library(folder, args.videos, checkpoint) for folder, checkpoint in zip(args.index, checkpoints, strict=True)
    ]
    # Whoever reaches the port could otherwise watch the videos.
    access = Access(args.host, args.token or ("" if is_loopback(args.host) else secrets.token_urlsafe(24)))
    port = listening.getsockname()[1]
    # Every address of this machine is no address to open.
    host = socket.gethostname() if args.host in ("0.0.0.0", "::") else args.host
    host = f"[{host}]" if ":" in host else host
    moments = sum(len(each.features.videos) for each in libraries)
    log.info("%s moments of %d videos", f"{moments:,}", sum(len(each.names) for each in libraries))
    print(f"open http://{host}:{port}/" + (f"?token={quote(access.token)}" if access.token else ""), flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # the usual end
        run(create_app(libraries, marks, access, tracks), listening, access, args.idle)
    return cli.DONE


if __name__ == "__main__":
    run_tool(main)
