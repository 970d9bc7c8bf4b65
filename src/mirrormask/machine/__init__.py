"""What knows the processor: instruction sets, LLVM IR to machine code, threads; optimizer and runtime stand on it."""
