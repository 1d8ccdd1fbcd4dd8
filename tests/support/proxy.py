"""A network that delays, stalls and resets: a TCP proxy between a client and its server, or the other way round."""

import asyncio
import socket
import struct
import threading
from contextlib import suppress


class Proxy:
    """Stands before a port of the loopback interface. `mode`: pass, delay, stall or reset."""

    def __init__(self, target, delay=0.05):
        self.target, self.delay, self.mode, self.bytes = target, delay, "pass", 0

    def __enter__(self):
        self.loop, ready = asyncio.new_event_loop(), threading.Event()

        async def listen():
            server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()
            async with server:
                await server.serve_forever()

        def run():
            self.task = self.loop.create_task(listen())
            try:
                self.loop.run_until_complete(self.task)
            except asyncio.CancelledError:
                rest = asyncio.all_tasks(self.loop)
                for task in rest:
                    task.cancel()
                if rest:
                    self.loop.run_until_complete(asyncio.wait(rest))

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()
        assert ready.wait(30)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.task.cancel)
        self.thread.join(30)
        self.loop.close()

    async def _connect(self, reader, writer):
        try:
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.target)
        except OSError:
            writer.transport.abort()
            return
        ends = writer, far_writer
        both = self._pump(reader, far_writer, ends), self._pump(far_reader, writer, ends)
        with suppress(asyncio.CancelledError):  # the proxy ends, and all of its connections
            await asyncio.gather(*both, return_exceptions=True)
        for end in ends:
            end.close()

    async def _pump(self, reader, writer, ends):
        while data := await reader.read(1 << 16):
            while self.mode == "stall":
                await asyncio.sleep(0.02)
            if self.mode == "delay":
                await asyncio.sleep(self.delay)
            if self.mode == "reset":
                for end in ends:
                    options = struct.pack("ii", 1, 0)  # closing says "connection reset by peer"
                    end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, options)
                    end.transport.abort()
                return
            self.bytes += len(data)
            writer.write(data)
            await writer.drain()
        writer.write_eof()
