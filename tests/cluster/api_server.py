"""A little HTTP server that answers like a router, from a script."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str | list[str]]  # status; JSON text, or the lines of a stream


class ApiServer:
    """`answers` maps a path to what is answered; what came is noted in `requests`."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[Any], Answer]] = {}
        self.requests: list[tuple[str, Any, dict[str, str]]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                server.requests.append((self.path, body, dict(self.headers)))
                answer = server.answers.get(self.path)
                status, content = answer(body) if answer else (404, '{"error": {"message": "no such path"}}')
                text = content if isinstance(content, str) else "".join(f"{line}\n\n" for line in content)
                self.send_response(status)
                self.send_header("Content-Length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())

            do_GET = do_POST = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()

    def says(self, path: str, content: Any, status: int = 200) -> None:
        self.answers[path] = lambda body: (status, json.dumps(content))

    def streams(self, path: str, *parts: str, error: str | None = None) -> None:
        lines = [f"data: {json.dumps({'choices': [{'delta': {'content': part}}]})}" for part in parts]
        lines.append(f"data: {json.dumps({'error': {'message': error}})}" if error else "data: [DONE]")
        self.answers[path] = lambda body: (200, lines)

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()
