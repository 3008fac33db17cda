#include "emulator.h"

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "guarded.h"

namespace emulated {
namespace {

constexpr std::size_t kStack = 64 << 10;

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
};

struct Warp {
  Barrier barrier;
  void* lanes[32] = {};
};

struct Block {
  explicit Block(std::size_t size, int threads)
      : memory(size), barrier{threads}, warps(threads / 32), running(threads) {
    for (Warp& warp : warps) warp.barrier.expected = 32;
  }
  Guarded memory;
  Barrier barrier;
  std::vector<Warp> warps;
  int running;
};

struct Copy {
  void* to;
  const void* from;
  bool exists;
};

struct Fiber {
  std::unique_ptr<char[]> stack{new char[kStack]};
  ucontext_t start;
  jmp_buf here;
  Place place;
  bool started, done;
  const Barrier* barrier;  // that it waits at
  unsigned generation;
  std::vector<std::vector<Copy>> copies;
};

std::vector<Fiber> fibers;
std::vector<Block> blocks;  // of the cluster that runs
Barrier cluster_barrier;
Fiber* current;
int first_block, cluster_size;
const std::function<void()>* entry;
jmp_buf scheduler;
sigjmp_buf failed;
const char* error;
std::minstd_rand random_number;

Block& own_block() { return blocks[current->place.block.x - first_block]; }

[[gnu::noinline]] void leave() {
  if (!_setjmp(current->here)) _longjmp(scheduler, 1);
}

void wait_at(Barrier& barrier) {
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  current->barrier = &barrier;
  current->generation = barrier.generation;
  leave();
}

void complete(std::vector<Copy>& group) {
  for (const Copy& copy : group) copy.exists ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
}

void enter() {
  (*entry)();
  current->done = true;
  --own_block().running;
  _longjmp(scheduler, 1);
}

[[gnu::noinline]] void make_ready(Fiber& fiber) {
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  fiber.place = place;
  fiber.started = fiber.done = false;
  fiber.barrier = nullptr;
  fiber.copies.assign(1, {});
}

// Functions that set a place to return to keep no variables of their own over it.
[[gnu::noinline]] void resume(Fiber& fiber) {
  current = &fiber;
  place = fiber.place;
  if (_setjmp(scheduler)) return;
  if (fiber.started) _longjmp(fiber.here, 1);
  fiber.started = true;
  setcontext(&fiber.start);
}

void run_cluster(int threads, std::size_t memory) {
  blocks.clear();
  for (int i = 0; i < cluster_size; ++i) blocks.emplace_back(memory, threads);
  cluster_barrier = {threads * cluster_size};
  struct Lanes {
    std::vector<Fiber*> fibers;
    unsigned lazy;  // how often of eight times it is not their turn
  };
  std::vector<Lanes> warps(threads * cluster_size / 32);
  const auto draw = [] { return std::array{0u, 0u, 4u, 7u}[random_number() % 4]; };
  unsigned lazy = 0;
  for (int i = 0; i < threads * cluster_size; ++i) {
    if (i % threads == 0) lazy = draw();
    if (i % 32 == 0) warps[i / 32].lazy = std::max(lazy, draw());
    Fiber& fiber = fibers[i];
    make_ready(fiber);
    fiber.place.thread.x = i % threads;
    fiber.place.block.x = first_block + i / threads;
    warps[i / 32].fibers.push_back(&fiber);
  }
  for (int idle = 0; !warps.empty(); ++idle) {
    // By now even the laziest have had their turn.
    if (idle > 1000) fail("threads wait for each other, or for some that have ended");
    std::shuffle(warps.begin(), warps.end(), random_number);
    for (Lanes& warp : warps) {
      if (random_number() % 8 < warp.lazy) continue;
      std::shuffle(warp.fibers.begin(), warp.fibers.end(), random_number);
      for (Fiber* fiber : warp.fibers) {
        if (fiber->barrier && fiber->barrier->generation == fiber->generation) continue;
        fiber->barrier = nullptr;
        idle = 0;
        resume(*fiber);
      }
      const auto done = [](Fiber* fiber) { return fiber->done; };
      warp.fibers.erase(std::remove_if(warp.fibers.begin(), warp.fibers.end(), done), warp.fibers.end());
    }
    const auto empty = [](const Lanes& warp) { return warp.fibers.empty(); };
    warps.erase(std::remove_if(warps.begin(), warps.end(), empty), warps.end());
  }
}

}  // namespace

Place place;

void fail(const char* what) {
  error = what;
  siglongjmp(failed, 1);
}

void sync_block() { wait_at(own_block().barrier); }
void sync_cluster() { wait_at(cluster_barrier); }

void together(void* mine, void (*work)(void** lanes)) {
  const unsigned thread = current->place.thread.x;
  Warp& warp = own_block().warps[thread / 32];
  warp.lanes[thread % 32] = mine;
  if (warp.barrier.arrived == 31) work(warp.lanes);
  wait_at(warp.barrier);
}

char* shared_memory() { return own_block().memory.data(); }

void check_shared(const void* place, std::size_t size, std::size_t alignment) {
  const Guarded& memory = own_block().memory;
  if (reinterpret_cast<std::uintptr_t>(place) % alignment) fail("an address is not aligned");
  if (place < memory.data() || static_cast<const char*>(place) + size > memory.data() + memory.size())
    fail("an address is not of the block's shared memory");
}

void* of_block(void* place, int block) {
  check_shared(place, 1, 1);
  if (block < 0 || block >= cluster_size) fail("no such block in the cluster");
  if (blocks[block].running == 0) fail("the other block of the cluster has ended");
  return blocks[block].memory.data() + (static_cast<char*>(place) - shared_memory());
}

void copy_async(void* to, const void* from, bool exists) {
  check_shared(to, 16, 16);
  if (reinterpret_cast<std::uintptr_t>(from) % 16) fail("an address is not aligned");
  std::memset(to, 0xff, 16);
  current->copies.back().push_back({to, from, exists});
}

void commit_copies() { current->copies.emplace_back(); }

void wait_for_copies(int groups) {
  auto& copies = current->copies;
  for (; static_cast<int>(copies.size()) - 1 > groups; copies.erase(copies.begin()))
    complete(copies.front());
}

int most_blocks_in_cluster = 0;
std::string launched;

const char* run(const std::function<void()>& kernel, std::int64_t count, int threads,
                std::size_t memory, int cluster, const char* name) {
  if (count == 0) return nullptr;
  if (count >> 31 || threads > 1024 || threads % 32) return "a launch of too many blocks or threads";
  if (cluster > 8 || count % cluster) return "a cluster of so many blocks cannot be launched";
  const onnx_tricks::cuda::Device device;
  if (memory > static_cast<std::size_t>(device.shared_memory)) return "too much shared memory";
  if (cluster > 1 && device.capability < 90) return "this device has no clusters";
  most_blocks_in_cluster = std::max(most_blocks_in_cluster, cluster);
  launched.append(name) += '\n';
  entry = &kernel;
  cluster_size = cluster;
  place = {{0}, {0}, {static_cast<unsigned>(threads)}, {static_cast<unsigned>(count)}};
  if (fibers.size() < static_cast<std::size_t>(threads * cluster)) fibers.resize(threads * cluster);

  static char signal_stack[64 << 10];
  stack_t stack{}, old_stack;
  stack.ss_sp = signal_stack;
  stack.ss_size = sizeof signal_stack;
  sigaltstack(&stack, &old_stack);
  struct sigaction action {}, old_action;
  action.sa_handler = [](int) { fail("memory was read or written where there is none"); };
  action.sa_flags = SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_action);
  error = nullptr;
  if (!sigsetjmp(failed, 1))
    for (first_block = 0; first_block < count; first_block += cluster) run_cluster(threads, memory);
  sigaction(SIGSEGV, &old_action, nullptr);
  sigaltstack(&old_stack, nullptr);
  return error;
}

}  // namespace emulated

// Of the largest launch since this was last asked.
extern "C" __attribute__((visibility("default"))) int emulated_blocks_in_cluster() {
  return std::exchange(emulated::most_blocks_in_cluster, 0);
}
// The types of all kernels launched since this was last asked.
extern "C" __attribute__((visibility("default"))) const char* emulated_launches() {
  static std::string names;
  names = std::exchange(emulated::launched, {});
  return names.c_str();
}

namespace onnx_tricks::cuda {

Device::Device() {
  const char* chosen = std::getenv("EMULATED_CAPABILITY");
  capability = chosen ? std::atoi(chosen) : 90;
  processors = 4;
  shared_memory = (capability >= 90 ? 227 : capability == 80 ? 163 : 99) << 10;
}

}  // namespace onnx_tricks::cuda
