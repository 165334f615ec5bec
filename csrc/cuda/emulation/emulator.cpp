// launch.h over the fibers of simt.h. One launch at a time; blocks one after the other, those of a cluster together.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <utility>

#include "async.h"
#include "cuda/tensor_map.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __asan_unpoison_memory_region(const volatile void*, size_t);
#endif

// rdi: where the stack pointer of the one that stops is kept; rsi: the stack pointer of the one that goes on.
extern "C" void fastlm_switch(void** from, void* to);
asm(R"(
.text
.globl fastlm_switch
.hidden fastlm_switch
.type fastlm_switch, @function
fastlm_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastlm_switch, .-fastlm_switch
)");

namespace simt {
namespace {

constexpr size_t STACK = 128 << 10;
constexpr unsigned MAX_THREADS = 1024 * 16;

std::map<std::string, Instance>& instances() {
  static std::map<std::string, Instance> all;
  return all;
}
std::string key(const std::string& op, int dtype, const std::string& name) {
  return op + "/" + std::to_string(dtype) + "/" + name;
}

void* scheduler = nullptr;
std::string failure;
Entry entry = nullptr;
const void* arguments = nullptr;

void run_fiber() {
  entry(arguments);
  end_thread();
  current->state = State::done;
  fastlm_switch(&current->stack_pointer, scheduler);
  std::abort();
}

class Scheduler {
 public:
  Scheduler(const fastlm::cuda::Grid& grid, fastlm::cuda::Order order)
      : threads_(grid.threads), cluster_(grid.cluster), order_(order) {
    if (static_cast<unsigned>(threads_ * cluster_) > MAX_THREADS) throw std::runtime_error("cluster too large");
    if (stacks_ == nullptr) {
      void* memory = mmap(nullptr, STACK * MAX_THREADS, PROT_READ | PROT_WRITE,
                          MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of emulated threads");
      stacks_ = static_cast<char*>(memory);
    }
    fibers_.resize(threads_ * cluster_);
    turn_.resize(fibers_.size());
    std::iota(turn_.begin(), turn_.end(), 0u);
    if (order_ == fastlm::cuda::Order::reversed) std::reverse(turn_.begin(), turn_.end());
  }
  ~Scheduler() {
    forget();
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks_, STACK * fibers_.size());  // frames that never returned
#endif
  }

  /// The blocks first .. first + cluster - 1 of row y of the grid.
  void run(unsigned first, unsigned y, size_t shared) {
    forget();
    shared_bytes = shared;
    for (int rank = 0; rank < cluster_; ++rank) {  // of exactly this size: AddressSanitizer knows its bounds
      void* memory = nullptr;
      if (posix_memalign(&memory, 128, std::max<size_t>(shared, 1)) != 0) throw std::runtime_error("no memory");
      std::memset(memory, 0xff, shared);
      shared_memory[rank] = static_cast<char*>(memory);
    }
    for (size_t i = 0; i < fibers_.size(); ++i) {
      Fiber& f = fibers_[i];
      const unsigned rank = static_cast<unsigned>(i / threads_), thread = static_cast<unsigned>(i % threads_);
      f = Fiber{};
      copies[i].clear();
      f.thread = {thread, 0, 0};
      f.block = {first + rank, y, 0};
      f.rank = rank;
      f.warp = static_cast<unsigned>(i / 32);
      f.lane = static_cast<unsigned>(i % 32);
      f.registers = std::min(65536 / threads_ / 8 * 8, 256);
      f.state = State::running;
      void** top = reinterpret_cast<void**>(stacks_ + STACK * (i + 1)) - 2;
      *top = reinterpret_cast<void*>(&run_fiber);
      for (int k = 0; k < 6; ++k) *--top = nullptr;
      f.stack_pointer = top;
    }
    begin_cluster(static_cast<unsigned>(cluster_), static_cast<unsigned>(threads_));
    size_t done = 0;
    while (done < fibers_.size()) {
      if (order_ == fastlm::cuda::Order::shuffled) shuffle();
      bool progress = false;
      for (unsigned i : turn_) {
        if (fibers_[i].state != State::running) continue;
        progress = true;
        current = &fibers_[i];
        fastlm_switch(&scheduler, current->stack_pointer);
        current = nullptr;
        if (!failure.empty()) fail(std::exchange(failure, {}));
        done += fibers_[i].state == State::done;
      }
      progress |= release(State::at_warp, 32);
      progress |= release(State::at_group, 128);
      progress |= release(State::at_block, threads_);
      progress |= release(State::at_cluster, fibers_.size());
      if (progress || done == fibers_.size()) continue;
      if (copies_under_way() == 0) fail("threads wait at barriers that the others never reach" + who_waits(fibers_));
      land(choose(copies_under_way()));
    }
    end_cluster(fibers_);
  }

 private:
  /// Lets go on whoever waits at the barrier in groups of this many threads that are all there.
  bool release(State barrier, size_t group) {
    bool any = false;
    for (size_t first = 0; first < fibers_.size(); first += group) {
      const auto from = fibers_.begin() + first, to = from + std::min(group, fibers_.size() - first);
      const auto waiting = std::count_if(from, to, [&](const Fiber& f) { return f.state == barrier; });
      if (waiting == 0) continue;
      const auto gone = std::count_if(from, to, [](const Fiber& f) { return f.state == State::done; });
      if (waiting + gone < to - from) continue;
      if (gone > 0) fail("a barrier or a warp's collective that some threads have returned before");
      if (std::any_of(from, to, [&](const Fiber& f) { return f.site != from->site; }))
        fail("threads wait at different barriers or collectives");
      for (auto f = from; f != to; ++f) f->state = State::running;
      any = true;
    }
    return any;
  }

  static void forget() {
    for (char*& memory : shared_memory) {
      std::free(memory);
      memory = nullptr;
    }
  }

  void shuffle() {
    for (size_t i = turn_.size(); i > 1; --i) std::swap(turn_[i - 1], turn_[random() % i]);
  }

  /// Which of so many copies lands next.
  size_t choose(size_t copies) {
    if (order_ == fastlm::cuda::Order::forward) return 0;
    return order_ == fastlm::cuda::Order::reversed ? copies - 1 : random() % copies;
  }
  size_t random() {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return random_ >> 33;
  }

  static char* stacks_;
  int threads_, cluster_;
  fastlm::cuda::Order order_;
  std::vector<Fiber> fibers_;
  std::vector<unsigned> turn_;
  uint64_t random_ = 88172645463325252u;
};
char* Scheduler::stacks_ = nullptr;

}  // namespace

void wait(State barrier, int site) {
  if (barrier == State::at_block) note("named_sync", 0, block_size.x);
  if (barrier == State::at_warp && site == SYNCWARP) note("syncwarp");
  current->state = barrier;
  current->site = site;
  fastlm_switch(&current->stack_pointer, scheduler);
}

void fail(const std::string& message) {
  if (current == nullptr) throw std::runtime_error(message);
  failure = message;
  fastlm_switch(&current->stack_pointer, scheduler);
  std::abort();
}

int add(const char* op, int dtype, const char* name, Instance instance) {
  if (!instances().emplace(key(op, dtype, name), instance).second) std::abort();  // the same kernel twice
  return 0;
}

}  // namespace simt

namespace fastlm::cuda {
namespace {

std::mutex mutex;
Device chip{90, 4, 227 << 10, 228 << 10, 50 << 20};
Order order = Order::forward;
bool recording = false;
int64_t only_last = 0;
std::vector<Recorded> recorded;

}  // namespace

const Device& device(int) { return chip; }

void set_loader(Loader) {}

void emulate(const std::string& name, Device device) {
  chip = device;
  if (name == "forward")
    order = Order::forward;
  else if (name == "reversed")
    order = Order::reversed;
  else if (name == "shuffled")
    order = Order::shuffled;
  else
    throw std::invalid_argument("order must be forward, reversed or shuffled, got " + name);
}

void record(bool on) {
  recording = on;
  recorded.clear();
}

std::vector<Recorded> records() { return recorded; }

void tail(int64_t blocks) { only_last = blocks; }

void trace(bool on) { simt::trace(on); }

std::vector<Traced> traces() {
  std::vector<Traced> all;
  for (const simt::Noted& n : simt::traces()) all.emplace_back(n.block, n.thread, n.what, n.a, n.b, n.c);
  return all;
}

TensorMap tensor_map(DType dtype, const void* base, const std::array<int64_t, 5>& sizes,
                     const std::array<int64_t, 4>& strides, const std::array<int, 5>& box, int swizzle) {
  check_tensor_map(dtype, base, sizes, strides, box, swizzle);
  if (2 * box[0] != swizzle)
    throw std::invalid_argument("the emulation takes boxes whose rows are the swizzle's bytes");
  simt::Tensor t{simt::TENSOR_MAGIC, static_cast<char*>(const_cast<void*>(base)), {}, {}, {}, {}};
  for (int i = 0; i < 5; ++i) {
    t.sizes[i] = static_cast<uint64_t>(sizes[i]);
    t.box[i] = static_cast<uint16_t>(box[i]);
    if (i > 0) t.strides[i - 1] = static_cast<uint64_t>(2 * strides[i - 1]);
  }
  t.swizzle = static_cast<uint16_t>(swizzle);
  TensorMap map{};
  static_assert(sizeof t <= sizeof map, "the room of a map");
  std::memcpy(&map, &t, sizeof t);
  return map;
}

std::vector<std::string> instances() {
  std::vector<std::string> names;
  for (const auto& [name, instance] : simt::instances()) names.push_back(name);
  return names;
}

void Kernel::start(DType dtype, int variant, const Grid& grid, const void* arguments, size_t size, int, Stream) {
  check_grid(*this, variant, grid);
  const std::lock_guard<std::mutex> guard(mutex);
  const std::string instance = name_ + ("_" + std::to_string(variant));
  const auto found = simt::instances().find(simt::key(op_, static_cast<int>(dtype), instance));
  if (found == simt::instances().end())
    throw std::runtime_error(std::string(op_) + ".cu has no kernel " + instance + " for " + name_of(dtype));
  const std::string where = instance + " (" + name_of(dtype) + "): ";
  if (grid.threads > found->second.threads)
    throw std::runtime_error(where + std::to_string(grid.threads) + " threads, above its launch bounds of " +
                             std::to_string(found->second.threads));
  if (size != found->second.arguments) throw std::runtime_error(where + "launched with another struct");
  if (grid.shared > chip.shared) throw std::runtime_error(where + "more shared memory than the GPU has");
  if (grid.cluster > 1 && chip.arch < 90) throw std::runtime_error(where + "a cluster on a GPU older than sm_90");
  if (recording) {
    recorded.emplace_back(op_, static_cast<int>(dtype), instance, grid.x, grid.y, grid.threads, grid.cluster,
                          grid.shared);
    return;
  }
  if (grid.x == 0 || grid.y == 0) return;
  simt::entry = found->second.entry;
  simt::arguments = arguments;
  simt::grid_size = {static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1};
  simt::block_size = {static_cast<unsigned>(grid.threads), 1, 1};
  simt::cluster_blocks = static_cast<unsigned>(grid.cluster);
  simt::begin_trace(grid.x * grid.y, grid.threads, grid.shared);
  simt::Scheduler scheduler(grid, order);
  const unsigned clusters = simt::grid_size.x / grid.cluster, blocks = clusters * simt::grid_size.y;
  try {
    for (unsigned i = 0; i < blocks; ++i) {
      if (only_last > 0 && i >= only_last) break;
      unsigned at = order == Order::forward && only_last == 0 ? i : blocks - 1 - i;
      if (order == Order::shuffled && only_last == 0 && blocks % 7919 != 0)
        at = static_cast<unsigned>(uint64_t{i} * 7919 % blocks);
      scheduler.run(at % clusters * grid.cluster, at / clusters, grid.shared);
    }
  } catch (const std::runtime_error& error) {
    throw std::runtime_error(where + error.what());
  }
}

}  // namespace fastlm::cuda
