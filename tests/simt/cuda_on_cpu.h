// Enough of CUDA for g++ to compile csrc/cuda/*.cu and run the kernels on the CPU, one block after the other.
//
// Each thread of a block is a fiber with its own stack. A fiber runs until it reaches a barrier or a shuffle and goes
// on when all threads of the block (the warp) have reached the same one, so both have their real meaning. What a GPU
// would leave undefined or answer with a fault is an error here:
//  - a barrier or shuffle that some threads do not reach, or where threads meet from different lines;
//  - a vector access to an address that is not a multiple of its size.
// A missing barrier shows in the results: shared memory holds NaNs when a block starts, each warp runs as far as it can
// before the next one does, and blocks with an odd number run their warps and threads in reverse order.
// Not emulated: partial warp masks, atomics, dynamic shared memory, grids of more than one axis.
#pragma once

#include <link.h>
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// One OS thread runs a whole block, so thread-local is block-local, and one piece of memory holds all such variables.
#define __shared__ static thread_local

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

[[noreturn]] inline void fail(const std::string& what) { throw std::runtime_error("simt: " + what); }

// A fiber must not throw through the switch: its error waits here for the scheduler.
inline std::string& fault() {
  static std::string message;
  return message;
}

template <int kBytes>
inline void check_aligned(const void* p) {
  if (reinterpret_cast<uintptr_t>(p) % kBytes && fault().empty())
    fault() = "access of " + std::to_string(kBytes) + " bytes at an address that is no multiple of it";
}

// A vector of CUDA: copying one checks the addresses that are read and written. Not declared aligned, or the compiler
// would take the answer for granted.
template <class T, int kLength>
struct Vector;
template <class T>
struct Vector<T, 2> {
  T x, y;
  Vector(T x_, T y_) : x(x_), y(y_) {}
  Vector(const Vector& v) : x(v.x), y(v.y) { check_aligned<2 * sizeof(T)>(&v); }
  void operator=(const Vector& v) {
    check_aligned<2 * sizeof(T)>(this);
    x = v.x, y = v.y;
  }
};
template <class T>
struct Vector<T, 4> {
  T x, y, z, w;
  Vector(T x_, T y_, T z_, T w_) : x(x_), y(y_), z(z_), w(w_) {}
  Vector(const Vector& v) : x(v.x), y(v.y), z(v.z), w(v.w) { check_aligned<4 * sizeof(T)>(&v); }
  void operator=(const Vector& v) {
    check_aligned<4 * sizeof(T)>(this);
    x = v.x, y = v.y, z = v.z, w = v.w;
  }
};

constexpr int kWarp = 32;
constexpr size_t kStack = 64 << 10;

enum class Wait { kNothing, kBlock, kWarp, kDone };

struct Fiber {
#if defined(__x86_64__)
  void* stack_pointer;
#else
  ucontext_t context;
#endif
  dim3 index;
  Wait wait;
  int line;            // of the barrier or shuffle that it waits at
  int turn;            // which of the two mailboxes the next shuffle uses
  uint64_t mailbox[2];  // two: a lane may send again before the others have read
};

#if defined(__x86_64__)
// Saves the registers that a call must preserve, and changes stacks.
__attribute__((naked, noinline)) static void switch_stacks(void** /*save*/, void* /*to*/) {
  __asm__(
      "pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15\n"
      "movq %rsp, (%rdi); movq %rsi, %rsp\n"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret\n");
}
#endif

struct Machine {
  std::mutex busy;
  std::vector<Fiber> fibers;
  std::vector<char> stacks;
  std::function<void()> kernel;
  Fiber* current = nullptr;
  Fiber scheduler{};

  void enter(Fiber& to, Fiber& from) {
#if defined(__x86_64__)
    switch_stacks(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
  }

  void pause(Wait wait, int line) {
    Fiber& me = *current;
    me.wait = wait;
    me.line = line;
    enter(scheduler, me);
  }

  Fiber& lane(unsigned index) {
    return fibers[(current - fibers.data()) / kWarp * kWarp + index];
  }

  void prepare(Fiber& fiber, size_t number);
  void run_warp(size_t begin);
  void run_block();
  bool release(size_t begin, size_t end, Wait wait);
};

inline Machine machine;

inline void body() {
  machine.kernel();
  machine.pause(Wait::kDone, 0);
}

inline void Machine::prepare(Fiber& fiber, size_t number) {
  const unsigned n = static_cast<unsigned>(number);
  fiber = Fiber{};
  fiber.index = dim3(n % blockDim.x, n / blockDim.x % blockDim.y, n / blockDim.x / blockDim.y);
  char* stack = stacks.data() + number * kStack;
#if defined(__x86_64__)
  // What switch_stacks pops: six registers and the address of body; the slot after it aligns the stack as a call would.
  const uintptr_t top = reinterpret_cast<uintptr_t>(stack + kStack) / 16 * 16;
  void** frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(&body);
  fiber.stack_pointer = frame;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = stack;
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, &body, 0);
#endif
}

// Lets fibers [begin, end) go on if all of them wait for each other; fails if some never will.
inline bool Machine::release(size_t begin, size_t end, Wait wait) {
  const Fiber& first = fibers[begin];
  for (size_t i = begin; i < end; ++i) {
    if (fibers[i].wait != wait) return false;
    if (fibers[i].line != first.line)
      fail("threads wait at line " + std::to_string(first.line) + " and at line " + std::to_string(fibers[i].line));
  }
  for (size_t i = begin; i < end; ++i) fibers[i].wait = Wait::kNothing;
  return true;
}

// Fills this library's thread-local memory with NaNs (all ones).
inline void poison_shared_memory() {
  __shared__ int anchor;
  anchor = 0;  // makes sure that the memory exists
  struct Found {
    const char* inside;
    bool done;
  } found{reinterpret_cast<const char*>(&anchor), false};
  dl_iterate_phdr(
      [](dl_phdr_info* info, size_t, void* data) {
        Found& wanted = *static_cast<Found*>(data);
        char* memory = static_cast<char*>(info->dlpi_tls_data);
        for (int i = 0; memory && i < info->dlpi_phnum; ++i) {
          const auto& header = info->dlpi_phdr[i];
          if (header.p_type != PT_TLS) continue;
          if (wanted.inside < memory || wanted.inside >= memory + header.p_memsz) continue;
          std::memset(memory, 0xff, header.p_memsz);
          wanted.done = true;
        }
        return wanted.done ? 1 : 0;
      },
      &found);
  if (!found.done) fail("shared memory not found");
}

// Runs a warp as far as it gets without the others.
inline void Machine::run_warp(size_t begin) {
  do {
    for (size_t i = 0; i < kWarp; ++i) {
      Fiber& fiber = fibers[begin + (blockIdx.x % 2 ? kWarp - 1 - i : i)];
      if (fiber.wait != Wait::kNothing) continue;
      current = &fiber;
      threadIdx = fiber.index;
      enter(fiber, scheduler);
      if (fault().empty()) continue;
      const std::string what = fault();
      fault().clear();
      fail(what);
    }
  } while (release(begin, begin + kWarp, Wait::kWarp));
}

inline void Machine::run_block() {
  const size_t count = static_cast<size_t>(blockDim.x) * blockDim.y * blockDim.z;
  if (count == 0 || count % kWarp || count > 1024) fail("a block of " + std::to_string(count) + " threads");
  fibers.resize(count);
  if (stacks.size() < count * kStack) stacks.resize(count * kStack);
  for (size_t i = 0; i < count; ++i) prepare(fibers[i], i);
  poison_shared_memory();
  for (;;) {
    for (size_t i = 0; i < count; i += kWarp) run_warp(blockIdx.x % 2 ? count - kWarp - i : i);
    if (release(0, count, Wait::kBlock)) continue;
    size_t waiting = 0, line = 0;
    for (const Fiber& fiber : fibers)
      if (fiber.wait != Wait::kDone) ++waiting, line = static_cast<size_t>(fiber.line);
    if (waiting == 0) return;
    fail(
        std::to_string(waiting) + " of " + std::to_string(count) + " threads wait at line " + std::to_string(line) +
        " for others that never come");
  }
}

template <class T, class Source>
T exchange(unsigned mask, T value, Source source, int line) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu && fault().empty()) fault() = "partial warp masks are not emulated";
  Fiber& me = *machine.current;
  const int turn = me.turn;
  me.turn = 1 - turn;
  std::memcpy(&me.mailbox[turn], &value, sizeof(T));
  machine.pause(Wait::kWarp, line);
  const int lane = static_cast<int>(&me - machine.fibers.data()) % kWarp, from = source(lane);
  if (from < 0 || from >= kWarp) return value;
  std::memcpy(&value, &machine.lane(static_cast<unsigned>(from)).mailbox[turn], sizeof(T));
  return value;
}

}  // namespace simt

inline void __syncthreads(int line = __builtin_LINE()) { simt::machine.pause(simt::Wait::kBlock, line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  simt::exchange(mask, 0, [](int lane) { return lane; }, line);
}
template <class T>
T __shfl_sync(unsigned mask, T x, int from, int line = __builtin_LINE()) {
  return simt::exchange(mask, x, [=](int) { return from & (simt::kWarp - 1); }, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int with, int line = __builtin_LINE()) {
  return simt::exchange(mask, x, [=](int lane) { return lane ^ with; }, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int by, int line = __builtin_LINE()) {
  return simt::exchange(mask, x, [=](int lane) { return lane + by; }, line);
}

using float4 = simt::Vector<float, 4>;
using uint2 = simt::Vector<unsigned, 2>;
using uint4 = simt::Vector<unsigned, 4>;
using char4 = simt::Vector<signed char, 4>;
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline char4 make_char4(signed char x, signed char y, signed char z, signed char w) { return {x, y, z, w}; }

inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline float __fdividef(float a, float b) { return a / b; }
#define rsqrtf(x) (1.0f / std::sqrt(x))  // a macro: newer C libraries have a function of this name

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(x));
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat162 __floats2bfloat162_rn(float x, float y) {
  return {__float2bfloat16_rn(x), __float2bfloat16_rn(y)};
}

enum cudaError_t { cudaSuccess };
using cudaStream_t = void*;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return "no error"; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(
    const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments... arguments) {
  const std::lock_guard<std::mutex> lock(simt::machine.busy);
  gridDim = config->gridDim;
  blockDim = config->blockDim;
  simt::machine.kernel = [&] { kernel(Parameters(arguments)...); };
  for (unsigned block = 0; block < gridDim.x; ++block) {
    blockIdx = dim3(block, 0, 0);
    simt::machine.run_block();
  }
  return cudaSuccess;
}
