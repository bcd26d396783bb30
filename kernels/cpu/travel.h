// Calls of tokens that travel: addresses and sizes in lists, one of each rank. Included by
// module.cc. What fails here is a bug of the caller's, or bytes that are not what a peer should send.
#pragma once

// Lists of one length, as the kernels see them.
Segments segments(const Addresses& at, const Sizes& bytes) {
  if (at.size() != bytes.size()) throw std::invalid_argument("a size for every address");
  return {reinterpret_cast<char* const*>(at.data()), bytes.data(),
          static_cast<int64_t>(at.size())};
}

// Starts, tokens, slots; ranks, copies, chosen.
using CopiesAt = std::tuple<uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t, int64_t>;

Copies copies(const CopiesAt& c) {
  return {at<const int32_t>(std::get<0>(c)),
          at<const int32_t>(std::get<1>(c)),
          at<const int16_t>(std::get<2>(c)),
          std::get<3>(c),
          std::get<4>(c),
          std::get<5>(c)};
}

// Few rows are done before another thread could use the interpreter.
template <class Body>
auto unlocked_if(bool long_enough, const Body& body) {
  if (!long_enough) return body();
  const nb::gil_scoped_release unlocked;
  return body();
}

bool pack_tokens(uintptr_t x, uintptr_t normed, uintptr_t weights, int64_t rows, const Mixture& w,
                 const CopiesAt& which, const Addresses& areas, const Sizes& sizes) {
  return unlocked_if(rows > kQuickRows, [&] {
    return table().pack_tokens(at<const float>(x), at<const float>(normed),
                               at<const float>(weights), rows, w, copies(which),
                               segments(areas, sizes));
  });
}

bool relay_tokens(int payload, int64_t hidden, const Addresses& from, const Sizes& bytes,
                  const CopiesAt& which, const Addresses& areas, const Sizes& sizes) {
  const Copies c = copies(which);
  return unlocked_if(c.count > kQuickRows, [&] {
    return table().relay_tokens(static_cast<Kind>(payload), hidden, segments(from, bytes), c,
                                segments(areas, sizes));
  });
}

int64_t run_experts(const Mixture& w, int64_t chosen, const Addresses& from, const Sizes& bytes,
                    uintptr_t out) {
  const nb::gil_scoped_release unlocked;
  return table().run_experts(w, chosen, segments(from, bytes), at<void>(out));
}

// The bytes of every segment; none where the kernel refuses.
Sizes pack_sums(const Mixture& w, int64_t chosen, uintptr_t sums, int64_t rows,
                const Addresses& from, const Sizes& bytes, const Addresses& areas,
                const Sizes& sizes) {
  Sizes written(from.size());
  const bool done = unlocked_if(rows > kQuickRows, [&] {
    return table().pack_sums(w, chosen, at<const void>(sums), segments(from, bytes),
                             segments(areas, sizes), written.data());
  });
  return done ? written : Sizes();
}

int64_t relay_sums(const Mixture& w, const CopiesAt& which, const Addresses& came,
                   const Sizes& bytes, int64_t rows, uintptr_t out) {
  return unlocked_if(rows > kQuickRows, [&] {
    return table().relay_sums(w, copies(which), segments(came, bytes), rows, at<void>(out));
  });
}

bool combine(uintptr_t x, uintptr_t weights, int64_t rows, const Mixture& w, const CopiesAt& which,
             const Addresses& came, const Sizes& bytes, uintptr_t extra) {
  return unlocked_if(rows > kQuickRows, [&] {
    return table().combine(at<float>(x), at<const float>(weights), rows, w, copies(which),
                           segments(came, bytes), at<const float>(extra));
  });
}

void bind_travel(nb::module_& m) {
  const nb::call_guard<Counted> counted;
  m.def("pack_tokens", pack_tokens, counted);
  m.def("relay_tokens", relay_tokens, counted);
  m.def("run_experts", run_experts, counted);
  m.def("pack_sums", pack_sums, counted);
  m.def("relay_sums", relay_sums, counted);
  m.def("combine", combine, counted);
  m.def("shared", [](uintptr_t normed, int64_t rows, const Mixture& w, uintptr_t out) {
    table().shared(at<const float>(normed), rows, w, at<float>(out));
  }, nb::call_guard<Counted, nb::gil_scoped_release>());
}
