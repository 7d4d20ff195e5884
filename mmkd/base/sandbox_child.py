"""The inside of `mmkd.base.sandbox`, run as a script of its own: builds the sandbox around itself and runs a program there.

Nothing of mmkd is imported. The order matters: namespaces, then a root of its own, then the loss of all rights, then the program.
"""

import ctypes
import json
import os
import resource
import signal
import sys

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
PDEATHSIG, NO_NEW_PRIVS = 1, 38
NOBODY = 65534
LIBC = ctypes.CDLL(None, use_errno=True)


def call(what, result):
    """Raises OSError for a call of the system that failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind=None, flags=0, options=None):
    texts = [text.encode() if text is not None else None for text in (source, target, kind)]
    data = options.encode() if options is not None else None
    call(f"mount {target}", LIBC.mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), data))


def apart():
    """Namespaces of its own: no network, no other processes, mounts that nobody else sees."""
    flags = NEWNS | NEWUTS | NEWIPC | NEWPID | NEWNET
    if os.geteuid() == 0:
        call("unshare", LIBC.unshare(flags))
        return
    user, group = os.geteuid(), os.getegid()
    call("unshare", LIBC.unshare(flags | NEWUSER))
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def root_of_its_own(given):
    """An empty file system in memory, with nothing of the machine's but the interpreter and its libraries, read only."""
    root = given["root"]
    mount("none", "/", None, REC | PRIVATE)
    mount("tmpfs", root, "tmpfs", NOSUID | NODEV, "size=4m,nr_inodes=1000,mode=755")
    for path in given["links"]:
        os.makedirs(os.path.dirname(root + path), exist_ok=True)
        os.symlink(os.readlink(path), root + path)
    for path in given["folders"]:
        os.makedirs(root + path, exist_ok=True)
        mount(path, root + path, None, BIND)
        mount("none", root + path, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    with open(root + "/program.py", "w", encoding="utf-8", errors="replace") as file:
        file.write(given["code"])
    os.chmod(root + "/program.py", 0o644)
    os.mkdir(root + "/work")
    mount("tmpfs", root + "/work", "tmpfs", NOSUID | NODEV, f"size={given['files_bytes']},nr_inodes=1000,mode=777")
    mount("none", root, None, REMOUNT | BIND | RDONLY | NOSUID | NODEV)
    os.chroot(root)
    os.chdir("/work")


def without_rights(given):
    """Limits; and nothing that could take them away again."""
    seconds, output = given["seconds"], given["output_bytes"]
    limits = {
        resource.RLIMIT_CPU: int(seconds) + 2, resource.RLIMIT_AS: given["memory_bytes"], resource.RLIMIT_FSIZE: output,
        resource.RLIMIT_NOFILE: 32, resource.RLIMIT_CORE: 0, resource.RLIMIT_MEMLOCK: 0,
    }  # fmt: skip
    for which, limit in limits.items():
        resource.setrlimit(which, (limit, limit))
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))  # no process and no thread beside it
    call("prctl", LIBC.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))  # and a program that is not root has no capability after exec


def run(given, output):
    """In the first process of the new namespace: the program, and its end."""
    call("prctl", LIBC.prctl(PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    child = os.fork()
    if child:
        os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) & 0xFF)
    without_rights(given)
    empty = os.open("/program.py", os.O_RDONLY)
    os.lseek(empty, 0, os.SEEK_END)
    for target, source in ((0, empty), (1, output), (2, output)):
        os.dup2(source, target)
    os.closerange(3, 256)
    os.execve(given["python"], [given["python"], "-I", "-S", "-B", "/program.py"], {"PYTHONHASHSEED": "0", "HOME": "/work"})


def main():
    output, told = int(sys.argv[1]), int(sys.argv[2])
    given = json.loads(sys.stdin.buffer.read())
    try:
        apart()
        root_of_its_own(given)
        child = os.fork()
        if not child:
            try:
                os.set_inheritable(told, False)
                run(given, output)
            except BaseException as error:
                os.write(told, str(error).encode())
                os._exit(1)
        os.close(told)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    except BaseException as error:
        os.write(told, str(error).encode())
        os._exit(1)
    os._exit(code & 0xFF)


if __name__ == "__main__":
    main()
