"""The generated function that runs a whole plan: one call from Python, however many layers and images.

    run(turns)   turns: their number, then the words of each: ops, count, arena, tensors, strides, tensor_count,
                        first, end, thread, threads, barrier, words per op, facts

    run_team(task)      task: entries, jobs, barrier, alone, then each job

The argument is one array of 64-bit words, because each argument of a foreign call costs time. ``run_team`` calls
``run`` on each thread of an OpenMP team, with the words of that thread's job; or, if there are fewer threads than jobs,
once, with the words of ``alone``. ``entries`` is :attr:`mirrormask.machine.openmp.OpenMP.entries`.

A turn runs some ops on some items. A plan over images or rows needs one turn; one over sequences of tokens one for each
buffer and each run of ops between two that take all buffers together, see :mod:`mirrormask.runtime.kernels.facts`.
An op is the kernel's address, the address of its arguments, then the bounds of each thread's work.
With a barrier, the threads share every image: each does its part of an op, then waits for the others. Without one,
each thread runs all the ops on its own images, in an arena of its own.
"""

from __future__ import annotations

from mirrormask.runtime.kernels.facts import SLOT

__all__ = ["MAX_TENSORS", "MAX_THREADS", "SPINS", "WORDS", "emit", "op_words"]

MAX_THREADS = 64
#: inputs and outputs of a region
MAX_TENSORS = SLOT
#: Polls of the barrier before the thread offers its core to others.
SPINS = 2000
#: Words of a turn.
WORDS = 13


def op_words(threads: int) -> int:
    """Words per op: the kernel, its arguments, and one bound more than there are threads."""
    return 2 + threads + 1


def emit(name: str) -> str:
    """The driver's LLVM IR: the functions ``name`` and ``name_team``."""
    return _TEMPLATE.format(
        name=name, tensors=MAX_TENSORS, slots=MAX_TENSORS + 1, words=WORDS, spins=SPINS
    ) + _TEAM.format(name=name)


_TEMPLATE = """
define void @{name}_one(ptr %words) {{
entry:
  %ops.at = getelementptr i64, ptr %words, i64 0
  %ops = load ptr, ptr %ops.at
  %count.at = getelementptr i64, ptr %words, i64 1
  %count = load i64, ptr %count.at
  %arena.at = getelementptr i64, ptr %words, i64 2
  %arena = load ptr, ptr %arena.at
  %tensors.at = getelementptr i64, ptr %words, i64 3
  %tensors = load ptr, ptr %tensors.at
  %strides.at = getelementptr i64, ptr %words, i64 4
  %strides = load ptr, ptr %strides.at
  %n.at = getelementptr i64, ptr %words, i64 5
  %n = load i64, ptr %n.at
  %first.at = getelementptr i64, ptr %words, i64 6
  %first = load i64, ptr %first.at
  %end.at = getelementptr i64, ptr %words, i64 7
  %end = load i64, ptr %end.at
  %thread.at = getelementptr i64, ptr %words, i64 8
  %thread = load i64, ptr %thread.at
  %threads.at = getelementptr i64, ptr %words, i64 9
  %threads = load i64, ptr %threads.at
  %barrier.at = getelementptr i64, ptr %words, i64 10
  %barrier = load ptr, ptr %barrier.at
  %size.at = getelementptr i64, ptr %words, i64 11
  %size = load i64, ptr %size.at
  %facts.at = getelementptr i64, ptr %words, i64 12
  %facts = load ptr, ptr %facts.at
  %io = alloca [{slots} x ptr]
  %facts.slot = getelementptr ptr, ptr %io, i64 {tensors}
  store ptr %facts, ptr %facts.slot
  br label %images
images:
  %image = phi i64 [%first, %entry], [%image.next, %image.end]
  %image.more = icmp slt i64 %image, %end
  br i1 %image.more, label %pointers, label %done
pointers:
  %t = phi i64 [0, %images], [%t.next, %pointer]
  %t.more = icmp slt i64 %t, %n
  br i1 %t.more, label %pointer, label %ops.loop
pointer:
  %base.at = getelementptr ptr, ptr %tensors, i64 %t
  %base = load ptr, ptr %base.at
  %stride.at = getelementptr i64, ptr %strides, i64 %t
  %stride = load i64, ptr %stride.at
  %shift = mul i64 %stride, %image
  %moved = getelementptr float, ptr %base, i64 %shift
  %slot = getelementptr ptr, ptr %io, i64 %t
  store ptr %moved, ptr %slot
  %t.next = add i64 %t, 1
  br label %pointers
ops.loop:
  %i = phi i64 [0, %pointers], [%i.next, %op.end]
  %i.more = icmp slt i64 %i, %count
  br i1 %i.more, label %op, label %image.end
op:
  %word = mul i64 %i, %size
  %op.at = getelementptr i64, ptr %ops, i64 %word
  %kernel = load ptr, ptr %op.at
  %args.at = getelementptr i64, ptr %op.at, i64 1
  %args = load ptr, ptr %args.at
  %bounds = getelementptr i64, ptr %op.at, i64 2
  %low.at = getelementptr i64, ptr %bounds, i64 %thread
  %low = load i64, ptr %low.at
  %next.thread = add i64 %thread, 1
  %shared = icmp ne ptr %barrier, null
  %high.index = select i1 %shared, i64 %next.thread, i64 %threads
  %low.own = select i1 %shared, i64 %low, i64 0
  %high.at = getelementptr i64, ptr %bounds, i64 %high.index
  %high = load i64, ptr %high.at
  call void %kernel(ptr %args, ptr %arena, ptr %io, i64 %low.own, i64 %high)
  br i1 %shared, label %arrive, label %op.end
arrive:
  ; Word 0 of the barrier counts arrivals, and a round is over when all have arrived; word 1 is the address of the
  ; C function that offers this core to other threads.
  %before = atomicrmw add ptr %barrier, i64 1 seq_cst
  %round = udiv i64 %before, %threads
  %round.end = add i64 %round, 1
  %goal = mul i64 %round.end, %threads
  br label %wait
wait:
  %spin = phi i64 [0, %arrive], [%spin.next, %again]
  %now = load atomic i64, ptr %barrier seq_cst, align 8
  %arrived = icmp sge i64 %now, %goal
  br i1 %arrived, label %op.end, label %spinning
spinning:
  %spin.next = add i64 %spin, 1
  %long = icmp sgt i64 %spin.next, {spins}
  br i1 %long, label %yield, label %again
yield:
  %yield.slot = getelementptr ptr, ptr %barrier, i64 1
  %yield.at = load ptr, ptr %yield.slot
  %ignored = call i32 %yield.at()
  br label %again
again:
  br label %wait
op.end:
  %i.next = add i64 %i, 1
  br label %ops.loop
image.end:
  %image.next = add i64 %image, 1
  br label %images
done:
  ret void
}}

define void @{name}(ptr %turns) {{
entry:
  %count = load i64, ptr %turns
  %first = getelementptr i64, ptr %turns, i64 1
  br label %more
more:
  %k = phi i64 [0, %entry], [%k.next, %turn]
  %left = icmp slt i64 %k, %count
  br i1 %left, label %turn, label %end
turn:
  %shift = mul i64 %k, {words}
  %words = getelementptr i64, ptr %first, i64 %shift
  call void @{name}_one(ptr %words)
  %k.next = add i64 %k, 1
  br label %more
end:
  ret void
}}
"""

_TEAM = """
define void @{name}_job(ptr %task) {{
entry:
  %entries = load ptr, ptr %task
  %own.at = getelementptr ptr, ptr %entries, i64 1
  %own.function = load ptr, ptr %own.at
  %own.32 = call i32 %own.function()
  %own = sext i32 %own.32 to i64
  %size.at = getelementptr ptr, ptr %entries, i64 2
  %size.function = load ptr, ptr %size.at
  %size.32 = call i32 %size.function()
  %size = sext i32 %size.32 to i64
  %jobs.at = getelementptr i64, ptr %task, i64 1
  %jobs = load i64, ptr %jobs.at
  %few = icmp slt i64 %size, %jobs
  %count = select i1 %few, i64 1, i64 %jobs
  %first = select i1 %few, i64 3, i64 4
  %busy = icmp slt i64 %own, %count
  br i1 %busy, label %work, label %done
work:
  %index = add i64 %first, %own
  %words.at = getelementptr ptr, ptr %task, i64 %index
  %words = load ptr, ptr %words.at
  call void @{name}(ptr %words)
  br label %done
done:
  ret void
}}

define void @{name}_team(ptr %task) {{
entry:
  %entries = load ptr, ptr %task
  %parallel = load ptr, ptr %entries
  %lost = icmp eq ptr %parallel, null
  br i1 %lost, label %alone, label %together
alone:
  %words.at = getelementptr ptr, ptr %task, i64 3
  %words = load ptr, ptr %words.at
  call void @{name}(ptr %words)
  ret void
together:
  %barrier.at = getelementptr ptr, ptr %task, i64 2
  %barrier = load ptr, ptr %barrier.at
  store i64 0, ptr %barrier
  %jobs.at = getelementptr i64, ptr %task, i64 1
  %jobs = load i64, ptr %jobs.at
  %threads = trunc i64 %jobs to i32
  call void %parallel(ptr @{name}_job, ptr %task, i32 %threads, i32 0)
  ret void
}}
"""
