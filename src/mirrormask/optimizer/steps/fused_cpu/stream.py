"""Writing x past the caches, in LLVM IR.

A processor that stores into memory reads it first, unless the store says that it is not to be kept: for an array that
is only written that saves one of two passes. LLVM leaves a loop with such stores scalar, so the loop over a block
writes x into a buffer that stays in the first cache, and vectors go from there to memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["STREAMED_PIECE", "block_fields"]

#: How many elements are updated between two copies: the buffer is small beside the first cache, and the call beside
#: the block.
ELEMENTS = 512

#: A piece, whose x is written as it comes or, if ``stream`` says so, past the caches. Whatever reads x next does so
#: after the fence. Without builtins, since the loops over less than a line would become calls of memcpy.
STREAMED_PIECE = """
define internal void @{name}_stream(ptr noalias %to, ptr noalias %from, i64 %count) noinline "no-builtins" {{
entry:
  %address = ptrtoint ptr %to to i64
  %odd.bytes = and i64 %address, 3
  %odd = icmp ne i64 %odd.bytes, 0
  %minus = sub i64 0, %address
  %bytes = and i64 %minus, 63
  %lead = lshr i64 %bytes, 2
  %long = icmp ugt i64 %lead, %count
  %all = or i1 %odd, %long
  %begin = select i1 %all, i64 %count, i64 %lead
  %rest = sub i64 %count, %begin
  %whole = and i64 %rest, -16
  %end = add i64 %begin, %whole
  br label %first
first:
  %f = phi i64 [0, %entry], [%f.next, %first.body]
  %f.more = icmp ult i64 %f, %begin
  br i1 %f.more, label %first.body, label %lines
first.body:
  %f.from = getelementptr float, ptr %from, i64 %f
  %f.to = getelementptr float, ptr %to, i64 %f
  %f.value = load float, ptr %f.from
  store float %f.value, ptr %f.to
  %f.next = add nuw nsw i64 %f, 1
  br label %first
lines:
  %i = phi i64 [%begin, %first], [%i.next, %lines.body]
  %i.more = icmp ult i64 %i, %end
  br i1 %i.more, label %lines.body, label %last
lines.body:
  %low.from = getelementptr float, ptr %from, i64 %i
  %low.to = getelementptr float, ptr %to, i64 %i
  %high = add nuw nsw i64 %i, 8
  %high.from = getelementptr float, ptr %from, i64 %high
  %high.to = getelementptr float, ptr %to, i64 %high
  %low.value = load <8 x float>, ptr %low.from, align 4
  %high.value = load <8 x float>, ptr %high.from, align 4
  store <8 x float> %low.value, ptr %low.to, align 32, !nontemporal !0
  store <8 x float> %high.value, ptr %high.to, align 32, !nontemporal !0
  %i.next = add nuw nsw i64 %i, 16
  br label %lines
last:
  %l = phi i64 [%end, %lines], [%l.next, %last.body]
  %l.more = icmp ult i64 %l, %count
  br i1 %l.more, label %last.body, label %done
last.body:
  %l.from = getelementptr float, ptr %from, i64 %l
  %l.to = getelementptr float, ptr %to, i64 %l
  %l.value = load float, ptr %l.from
  store float %l.value, ptr %l.to
  %l.next = add nuw nsw i64 %l, 1
  br label %last
done:
  ret void
}}

define internal void @{name}_piece({parameters}, i64 %stream) {{
entry:
  %buffer = alloca [{elements} x float], align 64
  %streams = icmp ne i64 %stream, 0
  br i1 %streams, label %head, label %whole
whole:
  call void @{name}_block({arguments})
  ret void
head:
  %at = phi i64 [0, %entry], [%at.next, %body]
  %left = sub i64 %count, %at
  %more = icmp sgt i64 %left, 0
  br i1 %more, label %body, label %done
body:
  %short = icmp slt i64 %left, {elements}
  %size = select i1 %short, i64 %left, i64 {elements}
{places}
  %first.at = add i64 %first, %at
  call void @{name}_block({block})
  call void @{name}_stream(ptr %x.at, ptr %buffer, i64 %size)
  %at.next = add nuw nsw i64 %at, {elements}
  br label %head
done:
  fence seq_cst
  ret void
}}

!0 = !{{i32 1}}
"""


def block_fields(parameters: Sequence[tuple[str, str]], element: Callable[[str], str]) -> dict[str, object]:
    """What :data:`STREAMED_PIECE` takes beside a name: how a block of a piece is called.

    Args:
        parameters: of a piece, as pairs of a type and a name, but for the count and the first element.
        element: what each array is of.
    """
    places, block = [], []
    for kind, name in parameters:
        kind = kind.split()[0]
        if kind == "ptr":
            places.append(f"  %{name}.at = getelementptr {element(name)}, ptr %{name}, i64 %at")
            block.append("ptr %buffer" if name == "x" else f"ptr %{name}.at")
        else:
            block.append(f"{kind} %{name}")
    return {
        "elements": ELEMENTS,
        "places": "\n".join(places),
        "block": ", ".join([*block, "i64 %size", "i64 %first.at"]),
    }
