// What hopper.h asks of the emulation, in async.cpp (barriers, copies), products.cpp and trace.cpp. What the hardware
// does at a time of its own is done as late as it may be, and looked at as early as it may be:
//   - shared memory that a product or a copy reads is read when it is asked for and again when somebody waits for it;
//     it has to be the same. So a missing barrier in front of either, or behind it, is an error;
//   - sums of products are NaN until then, and so is memory that a copy writes;
//   - copies land when no thread can go on, in the scheduler's order.
// Registers of A are taken at once: a compiler that would reuse them too early says so (ptxas, C7513).
#pragma once
#include "simt.h"

namespace simt {

/// What fastlm::cuda::TensorMap holds here.
struct Tensor {
  uint64_t magic;
  char* base;
  uint64_t sizes[5];
  uint64_t strides[4];  // bytes
  uint16_t box[5];
  uint16_t swizzle;
};
constexpr uint64_t TENSOR_MAGIC = 0x70616d726f736e74;
struct Corner {
  int at[5];
};

void barrier_init(uint32_t barrier, int arrivals);
void barrier_init_done();
void barrier_arrive(uint32_t barrier);
void barrier_expect(uint32_t barrier, int bytes);
void barrier_wait(uint32_t barrier, int parity);
void named_barrier(int number, int threads, bool waits);
void set_registers(int count, bool up);

void fence_async();
const Tensor& tensor_of(const void* map);
void tile_load(uint32_t to, const void* map, uint32_t barrier, const Corner& corner);
void tile_store(const void* map, uint32_t from, const Corner& corner);
void bulk_load(uint32_t to, const void* from, int bytes, uint32_t barrier);
void bulk_add(float* to, uint32_t from, int bytes);
void bulk_commit();
void bulk_wait(int pending, bool written);

/// One product of a warp group: 64 x n += 64 x 16 times 16 x n.
struct Product {
  uint64_t a, b;  // descriptors
  int n;
  bool add, half, mixed, a_across, b_across;  // half: float16, not bfloat16; mixed: A in registers
  bool operator==(const Product& o) const {
    return a == o.a && b == o.b && n == o.n && add == o.add && half == o.half && mixed == o.mixed &&
           a_across == o.a_across && b_across == o.b_across;
  }
};
void multiply(const Product& product, float* d, const uint32_t* a);
void warpgroup_fence();
void warpgroup_commit();
void warpgroup_wait(int pending);

// --- for one another and the scheduler -------------------------------------------------------------------------------

inline unsigned thread_number() { return current->warp * 32 + current->lane; }
/// A place in some block's shared memory.
char* shared_of(unsigned rank, uint32_t address, unsigned bytes, unsigned alignment);
/// Fails where somebody has written these bytes since its last fence_async().
void check_fenced(uint32_t address, unsigned bytes, const char* reader);

void begin_cluster(unsigned blocks, unsigned threads);
void begin_products(size_t threads);
void end_thread();
void end_products();
void end_cluster(const std::vector<Fiber>& fibers);
/// Copies under way, and the landing of one of them.
size_t copies_under_way();
void land(size_t which);
std::string who_waits(const std::vector<Fiber>& fibers);

struct Noted {
  int64_t block;
  int thread;
  const char* what;
  int64_t a, b, c;
};
void trace(bool on);
const std::vector<Noted>& traces();
void begin_trace(int64_t blocks, int64_t threads, int64_t shared);

}  // namespace simt
