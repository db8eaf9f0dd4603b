// Autograd asks CUDA whether a device has a context before it goes backward, and on a machine without a driver that
// fails. Here the answer is no: that entry of the hooks' table of virtual functions is replaced, in a copy of the table.
#include <ATen/detail/CUDAHooksInterface.h>
#include <cstring>

static bool no(const void*, signed char) { return false; }

extern "C" void patch() {
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  bool (at::CUDAHooksInterface::*member)(c10::DeviceIndex) const = &at::CUDAHooksInterface::hasPrimaryContext;
  std::size_t offset;  // Itanium ABI: a pointer to a virtual member is 1 + its offset in the table
  std::memcpy(&offset, &member, sizeof offset);
  constexpr std::size_t kEntries = 128, kBefore = 2;  // more than the hooks have; offset to top and type information
  static void* table[kEntries];
  void**& current = *reinterpret_cast<void***>(&hooks);
  std::memcpy(table, current - kBefore, sizeof table);
  table[kBefore + (offset - 1) / sizeof(void*)] = reinterpret_cast<void*>(&no);
  current = table + kBefore;
}
