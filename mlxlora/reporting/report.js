for (const svg of document.querySelectorAll("figure svg")) {
  const dots = [...svg.querySelectorAll("circle")], tip = document.getElementById("tip");
  const width = svg.viewBox.baseVal.width;
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) * width / box.width;
    const far = (dot) => Math.abs(dot.cx.baseVal.value - x);
    const nearest = dots.reduce((a, b) => (far(b) < far(a) ? b : a));
    const at = dots.filter((dot) => Math.abs(dot.cx.baseVal.value - nearest.cx.baseVal.value) < 1);
    dots.forEach((dot) => dot.classList.toggle("at", at.includes(dot)));
    tip.textContent = at.map((dot) => dot.textContent).join("\n");
    tip.style.left = Math.max(8, Math.min(event.pageX + 12, document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = event.pageY + 16 + "px";
    tip.hidden = false;
  });
  svg.addEventListener("pointerleave", () => { tip.hidden = true; dots.forEach((dot) => dot.classList.remove("at")); });
}
