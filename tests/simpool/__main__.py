"""A simulated XenServer / XCP-ng pool: the real protocols, no hypervisor.

    python3 tests/simpool serve --pool POOL.json --dir DIR [--faults FAULTS.json] [--port N]
    python3 tests/simpool run   --pool POOL.json --dir DIR [--faults FAULTS.json] [--host NAME] -- COMMAND ARG ...
    python3 tests/simpool dump  --dir DIR
    python3 tests/simpool write --dir DIR --vm NAME --device xvda --block I [--count N] [--zero]
    python3 tests/simpool read  --dir DIR --vdi UUID
    python3 tests/simpool example
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from typing import Any, Dict, List, Optional

import pool_file
import state
from faults import Faults, FaultsFileError
from model import Pool
from schema import Failure

HERE = os.path.dirname(os.path.abspath(__file__))


class CommandError(Exception):
    """The command can't do what it was asked; the text says why."""


# ---------------------------------------------------------------------------------------------------------------------
# Serving


def start(options: argparse.Namespace) -> Any:
    """A server on the folder, with everything written there that clients look for."""
    import server
    try:
        with open(options.pool, encoding="utf-8") as stream:
            description = pool_file.check(json.load(stream))
        faults = Faults.read(options.faults)
    except ValueError as error:
        raise CommandError("%s: not JSON: %s" % (options.pool, error))
    except pool_file.PoolFileError as error:
        raise CommandError("%s: %s" % (options.pool, error))
    except FaultsFileError as error:
        raise CommandError("%s: %s" % (options.faults, error))
    os.makedirs(options.dir, exist_ok=True)
    lock = state.Lock(options.dir)
    try:
        state.begin(options.dir, description)
        running = server.Server(options.dir, state.open_for_serving(options.dir), faults, getattr(options, "port", None))
    except pool_file.PoolFileError as error:
        shutil.rmtree(state.private(options.dir), ignore_errors=True)
        raise CommandError("%s: %s" % (options.pool, error))
    running.folder_lock = lock
    master = running.pool.master()
    write_xe(os.path.join(options.dir, "bin"), running.socket_of(master), running.port)
    with open(os.path.join(options.dir, "url"), "w", encoding="ascii") as stream:
        stream.write(running.url_of(master) + "\n")
    return running


def write_xe(folder: str, socket_path: str, port: int) -> None:
    """The stand-in for `xe`: a program of its own, with interpreter, socket and port inside, for empty environments."""
    os.makedirs(folder, exist_ok=True)
    program = os.path.join(folder, "xe")
    code = "import sys\nsys.path.insert(0, %r)\nimport xe\nsys.exit(xe.main(sys.argv[1:], %r, %d))\n" % (
        HERE, socket_path, port)
    interpreter = sys.executable
    if len(os.fsencode(interpreter)) < 100 and not any(character.isspace() for character in interpreter):
        text = "#!%s -ISB\n%s" % (interpreter, code)
    else:
        # too long or with a space in it: the kernel would cut it
        text = "#!/bin/sh\n''''exec %s -ISB \"$0\" \"$@\" # '''\n%s" % (_shell_quoted(interpreter), code)
    with open(program + ".new", "w", encoding="utf-8", errors="surrogateescape") as stream:
        stream.write(text)
    os.chmod(program + ".new", 0o755)
    os.rename(program + ".new", program)


def _shell_quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def command_serve(options: argparse.Namespace) -> int:
    # Blocked, and waited for: a process that goes on after SIGSTOP may be given the signal in a thread that can't wake this one.
    ends = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    running = start(options)
    print("ready " + running.url_of(running.pool.master()), flush=True)
    signal.sigwait(ends)
    running.stop()
    return 0


def command_run(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise CommandError("run: no COMMAND behind --")
    child = None  # type: Optional[subprocess.Popen]
    stopped = []  # type: List[int]

    def pass_on(number: int, frame: Any) -> None:
        stopped.append(number)
        if child is not None:
            child.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    # ^C reaches the command by itself: both are in the terminal's foreground
    signal.signal(signal.SIGINT, lambda *_: None)
    running = start(options)
    try:
        host = running.pool.master() if options.host is None else running.pool.host_of(options.host)
        if host is None:
            raise CommandError("run: there is no host %s" % options.host)
        if not running.pool.is_live(host):
            raise CommandError("run: host %s is not live" % options.host)
        environment = dict(os.environb)
        bin_folder = os.fsencode(os.path.join(os.path.abspath(options.dir), "bin"))
        path = environment.get(b"PATH")
        environment[b"PATH"] = bin_folder if path is None else bin_folder + b":" + path
        environment[b"VMBACKUP_POOL"] = os.fsencode("%s %s" % (running.url_of(host), running.socket_of(host)))
        if options.host is not None:
            write_xe(os.path.join(options.dir, "bin"), running.socket_of(host), running.port)
        # without a PATH the command itself is looked for where a shell would; it still gets only our folder
        search = os.fsdecode(bin_folder + b":" + (path if path is not None else os.fsencode(os.defpath)))
        program = shutil.which(command[0], path=search)
        if program is None:
            raise CommandError("run: command not found: %s" % command[0])
        child = subprocess.Popen(command, executable=program, env=environment)
        if stopped:
            child.send_signal(stopped[0])
        status = child.wait()
        # time stops here for the pool, but its server does not die of it
        running.let_go()
    finally:
        running.stop()
    return status if status >= 0 else 128 - status


# ---------------------------------------------------------------------------------------------------------------------
# The state, with or without a server


def _load(folder: str) -> Pool:
    if not state.is_begun(folder):
        raise CommandError("%s: no pool was ever started here" % folder)
    return state.load(folder)


def command_dump(options: argparse.Namespace) -> int:
    pool = _load(options.dir)
    # one class per line; the whole at once would be slow with an indent, and unreadable without
    lines = ["%s: %s" % (json.dumps(cls), json.dumps(rows, sort_keys=True)) for cls, rows in sorted(pool.tables.items())]
    sys.stdout.write("{%s}\n" % ",\n ".join(lines))
    return 0


def command_read(options: argparse.Namespace) -> int:
    pool = _load(options.dir)
    try:
        disk = pool.disk(pool.ref_of("VDI", options.vdi))
    except Failure as error:
        raise CommandError(str(error))
    output = sys.stdout.buffer
    for block in range(disk.blocks()):
        output.write(disk.block(block))
    output.flush()
    return 0


def command_write(options: argparse.Namespace) -> int:
    # in an environment without a locale Python 3.6 takes what is not ASCII for bytes
    options.vm = os.fsencode(options.vm).decode("utf-8", "surrogateescape")
    if not state.is_begun(options.dir):
        raise CommandError("%s: no pool was ever started here" % options.dir)
    try:
        lock = state.Lock(options.dir)
    except state.InUse:
        answer = _ask_server(options.dir, {"vm": options.vm, "device": options.device, "block": options.block,
                                           "count": options.count, "zeros": options.zero})
        if not answer["ok"]:
            raise CommandError(answer["error"])
        return 0
    import server
    try:
        pool = state.open_for_writing(options.dir)
        server.guest_write(pool, options.vm, options.device, options.block, options.count, options.zero)
        pool.close_log()
    except KeyError as error:
        raise CommandError(error.args[0])
    except Failure as error:
        raise CommandError(str(error))
    finally:
        lock.release()
    return 0


def _ask_server(folder: str, wish: Dict[str, Any]) -> Dict[str, Any]:
    """Have the running server do it, over its private socket."""
    body = json.dumps(wish).encode("ascii")
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    descriptor = os.open(os.path.join(folder, "sockets"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        connection.connect("/proc/self/fd/%d/control" % descriptor)
        connection.sendall(b"POST /write HTTP/1.0\r\ncontent-length: %d\r\n\r\n" % len(body) + body)
        answer = b""
        while True:
            data = connection.recv(65536)
            if not data:
                break
            answer += data
    finally:
        os.close(descriptor)
        connection.close()
    return json.loads(answer.partition(b"\r\n\r\n")[2].decode("ascii"))


def command_example(options: argparse.Namespace) -> int:
    print(json.dumps(pool_file.EXAMPLE, indent=2))
    return 0


def main(arguments: List[str]) -> int:
    parser = argparse.ArgumentParser(prog="simpool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="verb", metavar="COMMAND")
    commands.required = True
    for verb, run in (("serve", command_serve), ("run", command_run)):
        sub = commands.add_parser(verb)
        sub.set_defaults(function=run)
        sub.add_argument("--pool", required=True, metavar="POOL.json")
        sub.add_argument("--dir", required=True)
        sub.add_argument("--faults", metavar="FAULTS.json")
        sub.add_argument("--port", type=int)
        if verb == "run":
            sub.add_argument("--host", metavar="NAME")
            sub.add_argument("command", nargs=argparse.REMAINDER)
    for verb, run in (("dump", command_dump), ("write", command_write), ("read", command_read)):
        sub = commands.add_parser(verb)
        sub.set_defaults(function=run)
        sub.add_argument("--dir", required=True)
        if verb == "write":
            sub.add_argument("--vm", required=True, metavar="NAME")
            sub.add_argument("--device", required=True)
            sub.add_argument("--block", required=True, type=int, metavar="I")
            sub.add_argument("--count", default=1, type=int, metavar="N", help="so many blocks from I on")
            sub.add_argument("--zero", action="store_true", help="the guest writes zeros")
        if verb == "read":
            sub.add_argument("--vdi", required=True, metavar="UUID")
    commands.add_parser("example").set_defaults(function=command_example)
    options = parser.parse_args(arguments)
    try:
        return options.function(options)
    except (CommandError, state.InUse, OSError) as error:
        sys.stderr.write("simpool: %s\n" % error)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
