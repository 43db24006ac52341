"""Runs one Python program under limits that it cannot lift. lsjax.evaluation.sandbox starts this file as a process.

This file imports only the standard library, because the process runs without site-packages.

  arguments: the memory limit in bytes and the limit of CPU seconds
  standard input: the program
  standard output: one line of JSON, "ready" or the reason why there is no sandbox, then one with the outcome
  working directory: the folder that the program may write to
"""

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

_FILE_BYTES, _OPEN_FILES = 2**24, 64
_LONGEST_DETAIL = 300

# Numbers of the system calls that a program may make, on x86-64 and on ARM64. Any other one fails with EACCES: sockets,
# processes and threads, signals to others, attributes of files, limits, mounts, and what the kernel will add later.
_SYSTEM_CALLS = {
    "x86_64": (
        0xC000003E,
        72,
        # files and folders, which Landlock restricts further
        (0, 1, 2, 3, 4, 5, 6, 8, 17, 18, 19, 20, 21, 22, 32, 33, 40, 74, 75, 77, 79, 80, 81, 82, 83, 84, 87, 89, 95),
        (217, 221, 257, 258, 262, 263, 264, 267, 269, 292, 293, 316, 326, 332, 439),
        # memory, own signals, time, identity, waiting, the end
        (9, 10, 11, 12, 13, 14, 15, 23, 24, 25, 28, 34, 35, 36, 37, 38, 39, 60, 63, 96, 98, 99, 100, 102, 104, 107),
        (7, 108, 110, 131, 186, 201, 202, 204, 219, 228, 229, 230, 231, 270, 271, 273, 318, 334),
    ),
    "aarch64": (
        0xC00000B7,
        25,
        (17, 23, 24, 34, 35, 38, 46, 48, 49, 50, 56, 57, 59, 61, 62, 63, 64, 65, 66, 67, 68, 71, 78, 79, 80, 82, 83),
        (166, 223, 276, 285, 291, 439),
        (72, 73, 93, 94, 98, 99, 101, 102, 103, 113, 114, 115, 123, 124, 128, 132, 134, 135, 139, 153, 160, 165, 169),
        (172, 173, 174, 175, 176, 177, 178, 179, 214, 215, 216, 222, 226, 233, 278, 293),
    ),
}
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC. Others could have signals sent to other processes.
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 1, 38, 22, 2
_LANDLOCK_CREATE_RULESET, _LANDLOCK_ADD_RULE, _LANDLOCK_RESTRICT_SELF = 444, 445, 446  # the same on both machines
_READ_FILE, _READ_FOLDER = 1 << 2, 1 << 3
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """The kernel's struct sock_fprog: a program that decides about system calls."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def main() -> None:
    """Reads a program from standard input, gives up all other rights, and runs it."""
    program = sys.stdin.buffer.read().decode()
    report = os.dup(1)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    try:
        _limit_resources(memory_bytes=int(sys.argv[1]), cpu_seconds=int(sys.argv[2]))
        _restrict_files()
        _restrict_system_calls()
    except OSError as error:
        _write(report, {"refused": str(error)})
        return
    _write(report, "ready")
    _write(report, {"error": _run(program)})


def _run(program: str) -> str | None:
    """Runs a program. Returns None when it came to its end, otherwise the exception that ended it."""
    try:
        exec(compile(program, "program", "exec"), {})
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed
        return f"{type(error).__name__}: {_text(error)}"[:_LONGEST_DETAIL]
    return None


def _text(error: BaseException) -> str:
    try:
        return str(error).encode(errors="replace").decode()
    except Exception:
        return "(it has no text)"


def _write(report: int, message: object) -> None:
    os.write(report, json.dumps(message).encode() + b"\n")


def _limit_resources(memory_bytes: int, cpu_seconds: int) -> None:
    limits = {
        resource.RLIMIT_AS: memory_bytes,
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: _FILE_BYTES,
        resource.RLIMIT_NOFILE: _OPEN_FILES,
        resource.RLIMIT_CORE: 0,
    }
    for which, limit in limits.items():
        resource.setrlimit(which, (limit, limit))
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # whoever watches the time limit may die
    _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _restrict_files() -> None:
    """Lets this process write below the working directory only, and read only that and the interpreter's libraries."""
    version = _LIBC.syscall(_LANDLOCK_CREATE_RULESET, None, ctypes.c_size_t(0), 1)
    if version < 1:
        raise OSError("this kernel has no Landlock (Linux 5.13 or newer, with it switched on)")
    every_right = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    rules = struct.pack("=Q", every_right)
    ruleset = _call("syscall", _LANDLOCK_CREATE_RULESET, rules, ctypes.c_size_t(len(rules)), 0)
    library = os.path.dirname(os.__file__)
    readable = (library, os.path.dirname(library), "/lib", "/lib64", "/usr/lib", "/usr/lib64")
    folders = [(os.getcwd(), every_right)]
    folders += [(folder, _READ_FILE | _READ_FOLDER) for folder in readable if os.path.isdir(folder)]
    for folder, rights in folders:
        descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY)
        _call("syscall", _LANDLOCK_ADD_RULE, ruleset, 1, struct.pack("=Qi", rights, descriptor), 0)
        os.close(descriptor)
    _call("syscall", _LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def _restrict_system_calls() -> None:
    """Installs a seccomp filter that refuses every system call that is not listed above."""
    if platform.machine() not in _SYSTEM_CALLS or sys.maxsize < 2**32:
        raise OSError(f"system calls of a {platform.machine()} machine are not known here")
    architecture, fcntl, *groups = _SYSTEM_CALLS[platform.machine()]
    load, equal, leave = 0x20, 0x15, 0x06
    allow, refuse, kill = 0x7FFF0000, 0x0005000D, 0x80000000  # 0x0005: with an error, 13: EACCES
    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), (leave, 0, 0, kill), (load, 0, 0, 0)]
    for number in (number for group in groups for number in group):
        lines += [(equal, 0, 1, number), (leave, 0, 0, allow)]
    lines += [(equal, 1, 0, fcntl), (leave, 0, 0, refuse), (load, 0, 0, 24)]  # 24: the second argument
    for command in _FCNTL_COMMANDS:
        lines += [(equal, 0, 1, command), (leave, 0, 0, allow)]
    lines.append((leave, 0, 0, refuse))
    code = b"".join(struct.pack("=HBBI", *line) for line in lines)
    _call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Program(len(lines), code)), 0, 0)


def _call(name: str, *arguments: object) -> int:
    """Calls a function of the C library. Raises OSError when it fails."""
    result = getattr(_LIBC, name)(*arguments)
    if result < 0:
        raise OSError(f"{name} failed: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main()
    os._exit(0)
