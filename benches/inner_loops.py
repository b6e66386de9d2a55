"""Lists the innermost loops of a binary that multiply and add in vectors, so that a bounds check, a spill or a
call in one of them is seen at once.

    RUSTFLAGS="-C symbol-mangling-version=v0" cargo bench --no-run -p benches --bench dense
    python3 benches/inner_loops.py target/release/deps/dense-<hash>

Each line is a loop: the instruction set that it was compiled for, its instructions, how many of them are
multiply-adds, how many read or write the stack, jumps (the one that closes the loop included), calls, and the
function. A tight product has 12 multiply-adds in 24 instructions, no stack, one jump. Needs `objdump`.
"""

import re
import subprocess
import sys

LEAST_MULTIPLY_ADDS = 4


def functions(binary):
    """Yields the name and instructions (address, operation, arguments) of each function."""
    command = ["objdump", "-d", "-C", "--no-show-raw-insn", binary]
    name, instructions = None, []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace") as objdump:
        for line in objdump.stdout:
            if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
                if name is not None:
                    yield name, instructions
                name, instructions = match[1], []
            elif match := re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)$", line):
                instructions.append((int(match[1], 16), match[2], match[3]))
    if name is not None:
        yield name, instructions


def innermost_loops(instructions):
    """Yields the first and last position of each loop that has no other in it."""
    position = {address: at for at, (address, _, _) in enumerate(instructions)}
    loops = []
    for at, (_, operation, arguments) in enumerate(instructions):
        target = re.match(r"([0-9a-f]+)", arguments)
        if operation.startswith("j") and target:
            start = position.get(int(target[1], 16))
            if start is not None and start <= at:
                loops.append((start, at))
    for loop in loops:
        inside = (other for other in loops if other != loop)
        if not any(loop[0] <= start and end <= loop[1] for start, end in inside):
            yield loop


def level_of(body):
    """The longest registers that a loop's arithmetic uses."""
    arguments = " ".join(arguments for _, _, arguments in body)
    for register, level in [("%zmm", "avx512"), ("%ymm", "avx2")]:
        if register in arguments:
            return level
    return "sse2"


def is_multiply_add(operation):
    return operation.startswith(("vfmadd", "vfnmadd", "vfmsub"))


def short(name):
    """Of a step that enters an instruction set, the step; without hashes of crates."""
    name = re.sub(r"\[[0-9a-f]+\]", "", name)
    match = re.search(r"graph_attention::(.*?)(::\{closure|$)", name)
    return match[1] if match else name


def main(binary):
    print("level    instr   fma  stack  jumps  calls  function")
    rows = []
    for name, instructions in functions(binary):
        for start, end in innermost_loops(instructions):
            body = instructions[start : end + 1]
            fma = sum(is_multiply_add(operation) for _, operation, _ in body)
            if fma < LEAST_MULTIPLY_ADDS:
                continue
            stack = sum("(%rsp" in arguments or "(%rbp" in arguments for _, _, arguments in body)
            jumps = sum(operation.startswith("j") for _, operation, _ in body)
            calls = sum(operation == "call" for _, operation, _ in body)
            rows.append((level_of(body), -fma, len(body), stack, jumps, calls, name, body[0][0]))
    for level, fma, length, stack, jumps, calls, name, address in sorted(rows):
        print(f"{level:7} {length:6} {-fma:5} {stack:6} {jumps:6} {calls:6}  {short(name)} at {address:x}")


if __name__ == "__main__":
    main(sys.argv[1])
