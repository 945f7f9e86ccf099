"""Which system calls a program may make, as a seccomp filter. An allow list: what is not named fails or kills.

A job is one process. It may have threads, files in its own folder and pipes to itself; it may not start processes,
open sockets to others, signal others, or change owners, modes and times of files, which Landlock does not watch.
"""

import platform
import struct
from functools import cache

# name=number on x86_64:number on aarch64, from the kernel's asm/unistd_64.h and asm-generic/unistd.h.
ALLOWED = """
read=0:63 write=1:64 readv=19:65 writev=20:66 pread64=17:67 pwrite64=18:68 preadv=295:69 pwritev=296:70 close=3:57
lseek=8:62 sendfile=40:71 copy_file_range=326:285 stat=4:- fstat=5:80 lstat=6:- newfstatat=262:79 statx=332:291
access=21:- faccessat=269:48 faccessat2=439:439 statfs=137:43 fstatfs=138:44 readlink=89:- readlinkat=267:78
getcwd=79:17 chdir=80:49 fchdir=81:50 getdents64=217:61 rename=82:- renameat=264:38 renameat2=316:276 unlink=87:-
unlinkat=263:35 mkdir=83:- mkdirat=258:34 rmdir=84:- ftruncate=77:46 fsync=74:82 fdatasync=75:83 fadvise64=221:223
flock=73:32 umask=95:166 dup=32:23 dup2=33:- dup3=292:24 pipe=22:- pipe2=293:59 poll=7:- ppoll=271:73 select=23:-
pselect6=270:72 epoll_create=213:- epoll_create1=291:20 epoll_ctl=233:21 epoll_wait=232:- epoll_pwait=281:22
eventfd2=290:19 sendto=44:206 recvfrom=45:207 getsockopt=55:209 setsockopt=54:208 getsockname=51:204
getpeername=52:205 shutdown=48:210 mmap=9:222 munmap=11:215 mprotect=10:226 mremap=25:216 madvise=28:233 brk=12:214
futex=202:98 futex_waitv=449:449 set_robust_list=273:99 set_tid_address=218:96 rseq=334:293 membarrier=324:283
arch_prctl=158:- sched_yield=24:124 sched_getaffinity=204:123 getcpu=309:168 rt_sigaction=13:134
rt_sigprocmask=14:135 rt_sigreturn=15:139 rt_sigpending=127:136 rt_sigsuspend=130:133 rt_sigtimedwait=128:137
sigaltstack=131:132 pause=34:- alarm=37:- getitimer=36:102 setitimer=38:103 timer_create=222:107
timer_settime=223:110 timer_gettime=224:108 timer_getoverrun=225:109 timer_delete=226:111 nanosleep=35:101
clock_nanosleep=230:115 clock_gettime=228:113 clock_getres=229:114 gettimeofday=96:169 time=201:- times=100:153
getpid=39:172 gettid=186:178 getppid=110:173 getuid=102:174 geteuid=107:175 getgid=104:176 getegid=108:177
getresuid=118:148 getresgid=120:150 getgroups=115:158 getpgrp=111:- getpgid=121:155 getsid=124:156
getpriority=140:141 getrlimit=97:163 setrlimit=160:164 getrusage=98:165 uname=63:160 sysinfo=99:179
getrandom=318:278 capget=125:90 close_range=436:436 exit=60:93 exit_group=231:94 restart_syscall=219:128
"""
# A program that tries one of these is not solving a task: it is killed at once.
FATAL = """
ptrace=101:117 process_vm_readv=310:270 process_vm_writev=311:271 kcmp=312:272 mount=165:40 umount2=166:39
pivot_root=155:41 chroot=161:51 unshare=272:97 setns=308:268 bpf=321:280 perf_event_open=298:241
userfaultfd=323:282 keyctl=250:219 add_key=248:217 request_key=249:218 init_module=175:105 finit_module=313:273
delete_module=176:106 kexec_load=246:104 reboot=169:142 open_by_handle_at=304:265 io_uring_setup=425:425
open_tree=428:428 move_mount=429:429 fsopen=430:430 mount_setattr=442:442 pidfd_getfd=438:438
process_madvise=440:440
"""
CONDITIONAL = """
open=2:- openat=257:56 clone=56:220 socketpair=53:199 fcntl=72:25 ioctl=16:29 prctl=157:167 prlimit64=302:261
kill=62:129 tgkill=234:131
"""

CLONE_THREAD = 0x10000
AF_UNIX, SOCK_STREAM, SOCK_TYPE_MASK = 1, 1, 0xF
O_ACCMODE, O_TRUNC = 0o3, 0o1000
# Copying, flags, locks, pipe sizes. F_SETOWN would make the kernel send signals to a process of one's choice.
FCNTL = [*range(8), 36, 37, 38, 1030, 1031, 1032]
TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX = 0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451
PR_SET_NAME, PR_GET_NAME, PR_SET_VMA = 15, 16, 0x53564D41
ITSELF = 0x5E1F1D
"""Stands for the job's own process id until that is known; above any that Linux gives (2**22)."""
_ANY = 0xFFFFFFFF
# For each conditional call, all of: argument, mask, values that it may have under the mask (32 bits each).
CONDITIONS: dict[str, list[tuple[int, int, list[int]]]] = {
    # Opening for reading with O_TRUNC empties a file, and Landlock before ABI 3 asks only for the right to read.
    "open": [(1, O_ACCMODE | O_TRUNC, [0, 1, 2, O_TRUNC | 1, O_TRUNC | 2])],
    "openat": [(2, O_ACCMODE | O_TRUNC, [0, 1, 2, O_TRUNC | 1, O_TRUNC | 2])],
    "clone": [(0, CLONE_THREAD, [CLONE_THREAD])],
    "socketpair": [(0, _ANY, [AF_UNIX]), (1, SOCK_TYPE_MASK, [SOCK_STREAM])],  # asyncio wakes itself by one
    "fcntl": [(1, _ANY, FCNTL)],
    "ioctl": [(1, _ANY, [TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX])],
    "prctl": [(0, _ANY, [PR_SET_NAME, PR_GET_NAME, PR_SET_VMA])],  # not PR_SET_PDEATHSIG
    "prlimit64": [(0, _ANY, [0, ITSELF])],
    "kill": [(0, _ANY, [ITSELF])],
    "tgkill": [(0, _ANY, [ITSELF])],
}
FIRST_WITH_ONE_NUMBER = 424
"""From this number on a call that is not named may be newer than this table: ENOSYS lets libc fall back."""

EPERM, ENOSYS = 1, 38
RET_KILL_PROCESS, RET_ERRNO, RET_ALLOW = 0x80000000, 0x00050000, 0x7FFF0000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column in the tables, AUDIT_ARCH."""
_LOAD, _EQUAL, _AT_LEAST, _AND, _RETURN, _JUMP = 0x20, 0x15, 0x35, 0x54, 0x06, 0x05
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in struct seccomp_data; the low half of an argument comes first on both architectures."""


def _numbers(table: str, column: int) -> dict[str, int]:
    pairs = [entry.split("=") for entry in table.split()]
    return {name: int(number) for name, both in pairs if (number := both.split(":")[column]) != "-"}


def _op(code: int, value: int, then: int = 0, otherwise: int = 0) -> bytes:
    return struct.pack("HBBI", code, then, otherwise, value)


ALLOW, KILL = _op(_RETURN, RET_ALLOW), _op(_RETURN, RET_KILL_PROCESS)
REFUSE, UNKNOWN = _op(_RETURN, RET_ERRNO | EPERM), _op(_RETURN, RET_ERRNO | ENOSYS)


def seccomp_filter(pid: int) -> bytes:
    """The BPF program for a job whose process id, as it sees it itself, is `pid`.

    Raises:
        OSError: the machine is neither x86_64 nor aarch64.
    """
    return _template().replace(struct.pack("I", ITSELF), struct.pack("I", pid))


@cache
def _template() -> bytes:
    """The filter for a process with the id ITSELF."""
    if platform.machine() not in _ARCHITECTURES:
        raise OSError(ENOSYS, f"no system call table for {platform.machine()}")
    column, audit = _ARCHITECTURES[platform.machine()]
    start = [_op(_LOAD, _ARCHITECTURE), _op(_EQUAL, audit, 1, 0), KILL, _op(_LOAD, _NUMBER)]
    return b"".join(start + _search(_segments(column)))


def _segments(column: int) -> list[tuple[int, list[bytes]]]:
    """The line of system call numbers cut where the answer changes: where a segment begins, the code that answers."""
    answers = {number: [ALLOW] for number in _numbers(ALLOWED, column).values()}
    answers |= {number: [KILL] for number in _numbers(FATAL, column).values()}
    answers |= {number: _check(CONDITIONS[name]) for name, number in _numbers(CONDITIONAL, column).items()}
    segments: list[tuple[int, list[bytes]]] = []
    for number in range(max(*answers, FIRST_WITH_ONE_NUMBER) + 2):
        answer = answers.get(number, [REFUSE] if number < FIRST_WITH_ONE_NUMBER else [UNKNOWN])
        if not segments or segments[-1][1] != answer:
            segments.append((number, answer))
    # The x32 calls of x86_64, from 0x40000000 on, are as good as unknown.
    return segments


def _check(conditions: list[tuple[int, int, list[int]]]) -> list[bytes]:
    """Code that allows a call if its arguments meet all conditions, and refuses it otherwise."""
    code: list[bytes] = []
    for argument, mask, values in conditions:
        code += [_op(_LOAD, _ARGUMENTS + 8 * argument), _op(_AND, mask)]
        # One of the values: on to the next condition, over the rest of the values and the refusal.
        code += [_op(_EQUAL, value, len(values) - at) for at, value in enumerate(values)]
        code += [REFUSE]
    return [*code, ALLOW]


def _search(segments: list[tuple[int, list[bytes]]]) -> list[bytes]:
    """Code that finds a number's segment by halving. The kernel tries every number when a filter is installed."""
    if len(segments) == 1:
        return segments[0][1]
    middle = len(segments) // 2
    below, above = _search(segments[:middle]), _search(segments[middle:])
    boundary = segments[middle][0]
    if len(below) < 256:
        return [_op(_AT_LEAST, boundary, len(below), 0), *below, *above]
    return [_op(_AT_LEAST, boundary, 0, 1), _op(_JUMP, len(below)), *below, *above]
