"""What each thread of a team does with a table, in LLVM IR."""

from __future__ import annotations

__all__ = ["TEAM"]

#: The shares of a table's pieces whose number, modulo the size of the team, is the thread's; see
#: :data:`mirrormask.optimizer.steps.fused_cpu.update.TASK`.
TEAM = """
define void @{name}_team(ptr %task) {{
entry:
{loads}
  %own.32 = call i32 %thread_num()
  %own = sext i32 %own.32 to i64
  %size.32 = call i32 %num_threads()
  %size = sext i32 %size.32 to i64
  br label %head
head:
  %s = phi i64 [%own, %entry], [%next, %body]
  %more = icmp slt i64 %s, %shares
  br i1 %more, label %body, label %done
body:
  %first.p = getelementptr i64, ptr %bounds, i64 %s
  %first = load i64, ptr %first.p
  %last.p = getelementptr i64, ptr %first.p, i64 1
  %last = load i64, ptr %last.p
  call void @{name}(ptr %task, i64 %first, i64 %last)
  %next = add i64 %s, %size
  br label %head
done:
  ret void
}}
"""
