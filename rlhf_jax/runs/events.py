"""TensorBoard's writers, closed so that a full disk leaves one error and no process that waits for ever."""

import sys

import tensorboardX


def close(writer: tensorboardX.SummaryWriter) -> None:
    """Close a writer of TensorBoard events; raises OSError where they cannot be written.

    Its thread dies of a full disk. Then the process would wait at its end for that thread to empty the queue, and try
    to write once more: so the writer is let go, with a warning that events are missing.
    """
    files = [file.event_writer for file in (writer.all_writers or {}).values()]
    is_alive = all(file._worker is None or file._worker.is_alive() for file in files)
    try:
        if is_alive:
            writer.close()
            return
    except OSError:
        _let_go(files)
        raise
    _let_go(files)
    print("warning: TensorBoard's events are not complete: they could not be written", file=sys.stderr)


def _let_go(files: list) -> None:
    for file in files:
        if file._event_queue is not None:
            file._event_queue.cancel_join_thread()
        file._closed = True
