"""Servers of socketserver's kind that run in a thread."""

import threading
from contextlib import contextmanager


@contextmanager
def serving(server, at_end=lambda: None):
    """Run a server for as long as the context lasts; `at_end` lets go what its handlers hold, before it is closed."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield
    finally:
        at_end()
        server.shutdown()
        thread.join()
        server.server_close()
